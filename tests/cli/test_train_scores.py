"""`train` has the reference score what the run looks at, and is the same run as with all scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, refused, run, train, usual

pytest.importorskip("mlx.core")

from helpers import log_of  # noqa: E402

from fpo_mlx import cache as rc  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402


def rows_of(n: int, what: str) -> list[dict]:
    """Pairs of n prompts, each of another length, that share no answer."""
    return [
        {"prompt": f"{what} {'and ' * k}{k}?", "chosen": f"It is {k}.", "rejected": f"Well, {k} …"}
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """40 training and 20 validation pairs, and the scores of all."""
    root = tmp_path_factory.mktemp("scores")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data" / "train.jsonl", *rows_of(40, "Question"))
    lines(root / "data" / "valid.jsonl", *rows_of(20, "Held out"))
    made = run("precompute", *usual(root), "--output", root / "ref")
    assert made.exit_code == 0, made.stderr
    assert len(scores_in(root / "ref")) == 120  # precompute scores all
    return root


def scores_in(folder: Path) -> rc.ReferenceCache:
    return rc.open_cache(folder, rc.read_identity(folder))


def own_cache() -> rc.ReferenceCache:
    (entry,) = rc.list_caches(Path(os.environ["FPO_MLX_CACHE"]) / "reference")
    return scores_in(entry.folder)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))


def result(out: Path) -> tuple:
    """All that a run leaves, but for clocks."""
    weights = {path.name: path.read_bytes() for path in sorted(out.rglob("*adapters.safetensors"))}
    return weights, log_of(out)


CASES = {
    "a few": (["--batch-size", 2, "--iters", 3, "--val-batches", 2], 6, 4),
    "accumulated": (["--batch-size", 2, "--iters", 3, "--grad-accumulation-steps", 2], 8, 20),
    "in micro batches": (["--batch-size", 4, "--micro-batch-size", 3, "--iters", 3], 12, 20),
    "no validation": (["--iters", 5, "--val-batches", 0], 5, 0),
    "every validation pair": (["--iters", 4, "--val-batches", -1], 4, 20),
    "a target": (["--iters", 4, "--target-drift", 0.05, "--val-batches", 17], 4, 17),
    "forward": (["--iters", 4, "--gradient", "forward", "--val-batches", 1], 4, 1),
    "two epochs": (["--batch-size", 8, "--iters", 8, "--val-batches", 1], 40, 8),
}


@pytest.mark.parametrize(("words", "pairs", "held"), CASES.values(), ids=CASES)
def test_a_run_scores_what_it_looks_at_and_is_the_same_to_the_bit(
    place, tmp_path, words, pairs, held
):
    """It scored the whole data set, for a day where three minutes of training were asked for."""
    words = [*words, "--learning-rate", 1e-3, "--steps-per-eval", 2]
    whole = train(place, tmp_path / "whole", "--reference", place / "ref", *words)
    assert whole.exit_code == 0, whole.stderr
    done = train(place, tmp_path / "some", *words)
    assert done.exit_code == 0, done.stderr
    assert f"scoring {pairs + held} of {pairs + held} pairs" in done.stderr
    assert len(own_cache()) == 2 * (pairs + held)
    of_valid = f" and {held} of 20 validation pairs" if held else ""
    assert f"scores of {pairs} of 40 training pairs{of_valid}, and of no others" in done.stderr
    assert result(tmp_path / "some") == result(tmp_path / "whole")


def test_a_run_that_looks_at_all_pairs_says_nothing_of_it(place, tmp_path):
    done = train(place, tmp_path / "out", "--batch-size", 8, "--iters", 5)
    assert done.exit_code == 0, done.stderr
    assert "and of no others" not in done.stderr
    assert len(own_cache()) == 120


def test_a_run_that_is_resumed_for_longer_scores_the_rest_and_is_the_undisturbed_one(
    place, tmp_path
):
    words = ["--batch-size", 2, "--learning-rate", 1e-3, "--val-batches", 2]
    assert train(place, tmp_path / "run", *words, "--iters", 3).exit_code == 0
    assert len(own_cache()) == 2 * (6 + 4)
    more = train(place, tmp_path / "run", *words, "--iters", 7, "--resume")
    assert more.exit_code == 0, more.stderr
    assert "scoring 8 of 18 pairs" in more.stderr
    assert len(own_cache()) == 2 * (14 + 4)
    shown = train(place, tmp_path / "run", *words[:-1], -1, "--iters", 8, "--resume")
    assert "scoring 18 of 36 pairs" in shown.stderr  # more validation pairs are looked at
    words += ["--iters", 7, "--reference", place / "ref"]
    assert train(place, tmp_path / "whole", *words).exit_code == 0
    last = "0000007_adapters.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_other_commands_score_the_rest(place, tmp_path):
    assert train(place, tmp_path / "out", "--val-batches", 1).exit_code == 0
    words = ["--adapter-path", tmp_path / "out", "--split", "train", "--samples", 0]
    done = run("evaluate", *usual(place), *words)
    assert done.exit_code == 0, done.stderr
    assert "scoring 38 of 40 pairs" in done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "was trained on these very pairs" not in done.stderr  # --split train says it already
    assert record["fingerprints"]["data"]


def test_a_cache_of_another_model_serves_where_it_has_what_the_run_looks_at(place, tmp_path):
    """And the first pairs, on which the two models are compared before any update."""
    converted = ["--hf-path", place / "model", "--mlx-path", tmp_path / "q8", "-q"]
    made = run("convert", *converted, "--q-bits", 8, "--q-group-size", 32)
    assert made.exit_code == 0, made.output
    words = ["--reference", tmp_path / "ref", "--max-start-gap", 5, "--val-batches", 1]
    first = train(place, tmp_path / "first", *words, model=tmp_path / "q8")
    assert first.exit_code == 0, first.stderr
    there = len(scores_in(tmp_path / "ref"))
    assert 2 * (16 + 1) <= there <= 2 * (16 + 2 + 1)
    done = train(place, tmp_path / "out", *words)
    assert done.exit_code == 0, done.stderr
    assert "was made with other weights" in done.stderr
    again = train(place, tmp_path / "longer", *words, "--iters", 30)
    refused(again, 1, "is of another model", "lacks")
    assert len(scores_in(tmp_path / "ref")) == there


def test_the_rows_of_one_answer_under_one_prompt_are_scored_once(place, tmp_path):
    """Scores are kept by response: of two pairs that share one, that run looks at both or one."""
    shared = [{**ROWS[0], "rejected": f"Other {n}."} for n in range(6)]
    data = lines(tmp_path / "data" / "train.jsonl", *shared).parent
    done = train(place, tmp_path / "out", "--iters", 3, data=data)
    assert done.exit_code == 0, done.stderr
    assert len(own_cache()) == 1 + 3
