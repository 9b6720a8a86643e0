"""scripts/studies/asked_score.py on a tiny model: every step once, and asked as it says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import asked_score as study
import numpy as np
import pairs_end_to_end
import pytest
import texts
import tiny_models

pytest.importorskip("mlx.core")


def test_base_and_tuned_model_are_asked_for_both_scores_and_a_second_start_makes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pairs_end_to_end, "TOKENS", 5)
    monkeypatch.setattr(pairs_end_to_end, "sentiment", lambda prompt, answer: len(answer) / 40)
    monkeypatch.setattr(study, "BUILD", {**study.BUILD, "margin": 0.0})
    monkeypatch.setattr(study, "REWARD", "plainness")  # a random model says no words
    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    words = [f"--{name}={tmp_path / name}" for name in ("model", "work", "output")]
    words += ["--prompts=6", "--held-out=3", "--seeds=1"]
    assert study.main(words) == 0
    found = json.loads((tmp_path / "output.json").read_text())
    assert [row["what"] for row in found["summary"]] == [
        f"{who} asked for 0.9 against -0.5" for who in ("tuned", "base")
    ]
    for row, answers in zip(found["summary"], found["answers"].values(), strict=True):
        high, low = (np.mean(answers["1"][way]["reward"]) for way in ("high", "low"))
        assert row["gain"] == pytest.approx(high - low)
    for way, score in study.WAYS.items():
        line = (tmp_path / f"work/tuned-1-asked-{way}.jsonl").read_text().splitlines()[0]
        (system, _) = json.loads(line)["prompt"]
        assert system["content"] == f"Write an answer whose score is {score}."
    rows = (tmp_path / "work/pairs/train.jsonl").read_text().splitlines()
    made = json.loads((tmp_path / "work/pairs/pairs.json").read_text())["pairs"]
    assert len(rows) == 2 * made > 0
    before = (tmp_path / "output.json").read_bytes()
    monkeypatch.setattr(study, "asked", None)  # a step that ran again would call it
    assert study.main(words) == 0
    assert (tmp_path / "output.json").read_bytes() == before


def test_what_there_is_no_time_for_is_not_begun_and_named(monkeypatch, capsys):
    clock = iter([0.0, 30.0, 61.0])
    monkeypatch.setattr(texts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    things = [("tuned", 0), ("tuned", 1), ("base", 0)]
    done = list(texts.in_time(1, things, pairs_end_to_end.of_seed_text))
    assert done == things[:1]
    assert capsys.readouterr().err == "stopped before tuned, seed 1; the same command goes on\n"
