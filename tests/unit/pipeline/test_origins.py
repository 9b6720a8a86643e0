"""What an adapter says of its training, and what is said where it is used otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpo_mlx.config import load_config
from fpo_mlx.pipeline import origins
from fpo_mlx.storage.adapter_files import own_template, run_of

MODEL = "owner/model"


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A model's folder of the fingerprint "here"."""
    monkeypatch.setattr(origins, "model_fingerprint", lambda path: "here")
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def adapter(folder: Path, **record) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"model": MODEL}))
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def said_of(folder: Path, model: Path, arguments=None) -> str:
    said: list[str] = []
    origins.warn_of_origin([folder], MODEL, model, None, said.append, arguments)
    return "\n".join(said)


@pytest.mark.parametrize("inner", [".", "best"])
@pytest.mark.parametrize(("made_of", "other"), [("here", False), ("elsewhere", True)])
def test_the_best_adapter_of_a_run_is_judged_as_the_run(tmp_path, model, inner, made_of, other):
    """By its name alone it was one of the same model, whatever the weights."""
    run = adapter(tmp_path / "run", fingerprints={"model": made_of})
    adapter(run / "best")
    assert ("made on other weights of that name" in said_of(run / inner, model)) is other


def test_a_run_on_a_model_of_another_name_is_named_as_such(tmp_path, model):
    run = adapter(tmp_path / "run", fingerprints={"model": "elsewhere"})
    (run / "adapter_config.json").write_text('{"model": "owner/other"}')
    assert "made for another model (owner/other)" in said_of(run, model)


def test_a_fingerprint_that_was_made_before_is_not_made_again(tmp_path, model, monkeypatch):
    monkeypatch.setattr(origins, "model_fingerprint", lambda path: pytest.fail("read again"))
    run = adapter(tmp_path / "run", fingerprints={"model": "known"})
    said: list[str] = []
    origins.warn_of_origin([run], MODEL, model, None, said.append, known="known")
    assert said == []


def test_a_run_that_is_called_best_is_its_own(tmp_path):
    own = adapter(tmp_path / "best", fingerprints={})
    (own / "chat_template.jinja").write_text("mine")
    assert run_of(own) == own
    assert own_template(own) == own / "chat_template.jinja"


def test_other_variables_of_the_template_are_named(tmp_path, model):
    run = adapter(tmp_path / "run", settings={"chat_template_args": {"enable_thinking": False}})
    adapter(run / "best")
    for folder in (run, run / "best"):
        said = said_of(folder, model, {})
        assert """--chat-template-args {"enable_thinking": false} and is asked with {}""" in said
        assert said_of(folder, model, {"enable_thinking": False}) == ""
    assert said_of(run, model) == ""  # nothing is asked
    assert said_of(adapter(tmp_path / "old", settings={}), model, {"a": 1}) == ""  # nothing kept


def test_the_weights_are_read_once_for_several_adapters(tmp_path, model, monkeypatch):
    read = []
    monkeypatch.setattr(origins, "model_fingerprint", lambda path: read.append(path) or "here")
    runs = [adapter(tmp_path / name, fingerprints={"model": "here"}) for name in "ab"]
    origins.warn_of_origin(runs, MODEL, model, None, lambda text: None)
    assert read == [model]


@pytest.mark.parametrize(
    ("there", "here", "seen"),
    [
        ({}, {}, True),
        ({"subset": "a", "train_split": "train_sft"}, {"subset": "b"}, False),
        ({"subset": "a"}, {"subset": "a"}, True),
        ({}, {"subset": "a"}, False),
        ({"train_split": "train[:1000]"}, {"train_split": "train[1000:]"}, False),
        ({"train_split": "train_prefs"}, {"train_split": "train_prefs"}, True),
        ({"train_split": "train"}, {}, True),
        ({"subset": "default"}, {}, True),
        ({"train_split": "train"}, {"train_split": "train[:1000]"}, True),
    ],
)
def test_only_a_run_on_the_same_part_of_a_hubs_data_set_has_seen_its_pairs(
    tmp_path, monkeypatch, there, here, seen
):
    """Two subsets of one data set were called the same data."""
    monkeypatch.setattr(origins, "find_splits", lambda source, hub: {"train": None})
    run = adapter(tmp_path / "run", settings={"data": "owner/pairs", **there})
    given = {"model": MODEL, "data": "owner/pairs", "valid_share": 0.2, "objective": "dpo", **here}
    said: list[str] = []
    found = origins.warn_of_training_pairs([run], [], said.append, load_config(given), "valid")
    assert bool(found) is seen
    assert ("it has seen most of these pairs" in "".join(said)) is seen
