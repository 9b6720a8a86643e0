"""Which cache a run reads, and that all processes are asked alike before any of them scores."""

import os
from dataclasses import replace

import pytest
from cached import IDENTITY, filled, make_pairs

from fpo_mlx import cache
from fpo_mlx.config import load_config
from fpo_mlx.errors import CacheMismatch
from fpo_mlx.pipeline import store
from fpo_mlx.pipeline.job import Job

PAIRS = make_pairs(4)


@pytest.fixture
def job(tmp_path):
    config = load_config({"model": "m", "objective": "dpo", "reference": str(tmp_path / "ref")})
    return Job(config, tmp_path, None, (), replace(IDENTITY, saes=()))


def asked(job, pairs, answer=None, **options):
    """What the processes were asked, and the cache; answer: of all of them together."""
    questions = []

    def agree(folder, lacking):
        questions.append((folder.name, lacking))
        return lacking if answer is None else answer

    return questions, lambda: store.reference_of(job, pairs, lambda _: None, agree=agree, **options)


def test_processes_are_asked_once_where_all_rows_are_there(job, tmp_path):
    filled(tmp_path / "ref", PAIRS)
    questions, run = asked(job, PAIRS)
    assert len(run()) == 8
    assert questions == [("ref", False)]


def test_processes_are_asked_once_where_the_cache_is_of_another_model(job, tmp_path):
    """It used to be taken before anybody was asked; a process without it then waited for ever."""
    filled(tmp_path / "ref", PAIRS, identity=replace(IDENTITY, model="other"))
    questions, run = asked(job, PAIRS, other_weights=True)
    assert run().differences == {"model": ("other", IDENTITY.model)}
    assert questions == [("ref", False)]
    with pytest.raises(CacheMismatch):
        asked(job, PAIRS)[1]()


def test_a_cache_of_another_model_that_lacks_rows_is_refused_with_their_number(job, tmp_path):
    """It said that the cache was made for something else, though a whole one is taken."""
    filled(tmp_path / "ref", PAIRS[:-2], identity=replace(IDENTITY, model="other"))
    keys = {key for pair in PAIRS for key in pair.keys}
    lacking = len(keys - {key for pair in PAIRS[:-2] for key in pair.keys})
    said = f"of another model \\(other\\) and lacks {lacking} of {len(keys)} responses"
    with pytest.raises(CacheMismatch, match=said):
        asked(job, PAIRS, other_weights=True)[1]()


def test_a_process_that_has_all_rows_scores_with_the_others_when_one_lacks_some(
    job, tmp_path, monkeypatch
):
    filled(tmp_path / "ref", PAIRS)
    monkeypatch.setattr(store, "score_into", lambda folder, *_, **__: ("scored", folder.name))
    questions, run = asked(job, PAIRS, answer=True)
    assert run() == ("scored", "ref")
    assert questions == [("ref", False)]


def test_a_cache_that_lacks_a_row_is_scored_into(job, tmp_path, monkeypatch):
    filled(tmp_path / "ref", PAIRS[:3])
    monkeypatch.setattr(store, "score_into", lambda folder, *_, **__: ("scored", folder.name))
    questions, run = asked(job, PAIRS)
    assert run() == ("scored", "ref")
    assert questions == [("ref", True)]


@pytest.mark.parametrize("model", [IDENTITY.model, "other"])
def test_a_cache_that_a_run_takes_counts_as_new_for_cache_prune(job, tmp_path, model):
    """Whether it is this model's own, or another's that --reference names."""
    filled(tmp_path / "ref", PAIRS, identity=replace(IDENTITY, model=model))
    for path in (tmp_path / "ref").iterdir():
        os.utime(path, (0, 0))
    assert asked(job, PAIRS, other_weights=True)[1]() is not None
    (entry,) = cache.list_caches(tmp_path)
    assert entry.days < 1
