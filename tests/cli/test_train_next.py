"""The commands that `train` ends with run as they are printed, on whatever splits the data have."""

from __future__ import annotations

import json
import shlex

import pytest
import tiny_models
from command_line import lines, run, train

pytest.importorskip("mlx.core")

ROWS = [
    {"prompt": f"Question {n}?", "chosen": f"It is {n}.", "rejected": f"Well, {n} …"}
    for n in range(6)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("next")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    return root


@pytest.fixture(autouse=True)
def own_cache(model, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(model / "user-cache"))


def next_of(done):
    """The printed commands by name, without the one that asks."""
    assert done.exit_code == 0, done.stderr
    found = [shlex.split(line) for line in done.stderr.splitlines() if line.startswith("  fpo-mlx")]
    return {words[1]: words[1:] for words in found if words[1] != "chat"}


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_they_run_after_the_first_training_in_a_folder_and_after_the_second(
    model, tmp_path, held_out
):
    data, out = tmp_path / "pairs", tmp_path / "out"
    lines(data / "train.jsonl", *ROWS)
    lines(data / f"{held_out}.jsonl", *ROWS[:2])
    how = {"sae": None, "data": data}
    for again in ((), ("--overwrite", "--learning-rate", "1e-4")):
        words = ("--objective", "dpo", "--iters", 2, *again)
        commands = next_of(train(model, out, *words, **how))
        assert set(commands) == {"evaluate", "compare", "fuse"}
        short = {"evaluate": ("--samples", 0), "compare": ("--max-tokens", 4)}
        for name, words in commands.items():
            assert ("--overwrite" in words) is (bool(again) and name != "fuse"), name
            told = run(*words, *short.get(name, ()))
            assert told.exit_code == 0, told.stderr
    record = json.loads((out / "run.json").read_text())
    read = {"validation": {"train": 6, "valid": 2}, "test": {"train": 6, "test": None}}
    assert record["splits"] == read[held_out]


def test_adapters_in_best_are_judged_compared_and_fused_as_they_are(model, tmp_path):
    data, out = tmp_path / "pairs", tmp_path / "out"
    lines(data / "train.jsonl", *ROWS)
    lines(data / "valid.jsonl", *ROWS[:2])
    train(model, out, "--objective", "dpo", "--iters", 2, sae=None, data=data)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [one for one in log if one["kind"] == "valid"]
    later = [{**seen[-1], "iteration": n, "best": n == 2} for n in (2, 3)]
    lines(out / "metrics.jsonl", *(one for one in log if one["kind"] != "valid"), *later)
    from fpo_mlx.report.commands import commands
    from fpo_mlx.report.read import read_run

    for line in commands(read_run(out, "out")):
        words = shlex.split(line)[1:]
        assert f"{out}/best" in words
        if words[0] == "chat":
            continue
        more = {"evaluate": ("--samples", 0), "compare": ("--max-tokens", 4)}.get(words[0], ())
        told = run(*words, *more)
        assert told.exit_code == 0, told.stderr
        assert words[0] != "evaluate" or "judged as" in told.stderr
