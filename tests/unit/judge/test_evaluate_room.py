"""Sampled answers of a model whose table of positions ends before --max-tokens does."""

from __future__ import annotations

import importlib
import json

import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from command_line import ROWS, lines, refused, run, usual  # noqa: E402

LONG = {"prompt": "long " * 40, "chosen": "A.", "rejected": "B."}
FLAGS = ("--split", "valid", "--objective", "dpo", "--samples", 2)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpt2")
    tiny_models.tiny_gpt2(root / "model", tokenizer=True, n_positions=256)
    lines(root / "data" / "valid.jsonl", LONG, *ROWS)
    return root


def test_a_prompt_without_room_for_an_answer_gives_its_place_to_the_next(gpt2, tmp_path):
    """All figures were thrown away, after the passes, for one long prompt among the first."""
    out = tmp_path / "e.json"
    words = (*usual(gpt2, sae=None), *FLAGS, "--json", out)
    done = run("evaluate", *words, "--max-tokens", 100)
    assert done.exit_code == 0, done.stderr
    assert "1 of the first 2 prompts get no sampled answer" in done.stderr
    assert len(json.loads(out.read_text())["answers"]) == 2


def test_where_no_prompt_has_room_the_command_ends_before_the_long_part(gpt2, monkeypatch):
    def long_part(*_, **__):
        raise AssertionError("the reference was run")

    module = importlib.import_module("fpo_mlx.pipeline.evaluate")  # the name is the function's
    monkeypatch.setattr(module, "reference_of", long_part)
    done = run("evaluate", *usual(gpt2, sae=None), *FLAGS, "--max-tokens", 256)
    refused(done, 3, "--max-tokens 256 go past the model's 256 positions")
