"""scripts/studies/hidden_moves.py: what a mean over tokens sees of features that move."""

from __future__ import annotations

import json

import hidden_moves
import numpy as np
import pytest
import tiny_models
from command_line import ROWS, lines, random_sae

from fpo_mlx import pipeline
from fpo_mlx.config import load_config
from fpo_mlx.sae.convert import write_saelens


def test_moves_of_opposite_sign_are_hidden_and_equal_ones_seen_by_hand():
    before = np.array([[2.0, 0.0, 1.0], [4.0, 0.0, 1.0]])
    there_and_back = before + [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]
    found = hidden_moves.moves(before, there_and_back, k=2)
    assert found == {"of_means": 0.0, "of_tokens": 1.0, "means": 9.0 + 1.0, "tokens": 10.0 + 1.0}
    alike = hidden_moves.moves(before, before + [0.0, 3.0, 0.0], k=1)  # a feature that wakes up
    assert alike["of_means"] == alike["of_tokens"] == 0.0, "3 is not above the other's mean of 3"
    alike = hidden_moves.moves(before, before + [0.0, 4.0, 0.0], k=1)
    assert alike["of_means"] == alike["of_tokens"] == 16.0
    seen = hidden_moves.summary([found, alike])
    assert seen["seen"] == pytest.approx(16.0 / 17.0)
    assert seen["drift"] == pytest.approx(np.sqrt((0.0 + 16.0 / 9.0) / 2))
    assert seen["token_drift"] == pytest.approx(np.sqrt((1.0 / 11.0 + 16.0 / 10.0) / 2))


def test_silent_features_are_not_looked_at():
    asleep = np.array([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    assert hidden_moves.top(asleep.mean(axis=0), 2).tolist() == [0]
    found = hidden_moves.moves(asleep, asleep + [0.5, 0.0, 0.0], k=3)
    assert found == {"of_means": 0.25, "of_tokens": 0.25, "means": 4.0, "tokens": 5.0}


def test_adapters_are_compared_between_their_parts_at_equal_drift():
    def point(drift, token_drift, seen):
        return {"rejected": {"drift": drift, "token_drift": token_drift, "seen": seen}}

    found = hidden_moves.at_drifts([point(0.15, 0.4, 0.1), point(0.05, 0.2, 0.3)])
    assert [one["drift"] for one in found] == [0.05, 0.1]
    assert found[1]["token_drift"] == pytest.approx(0.3)
    assert found[1]["seen"] == pytest.approx(0.2)


def test_the_drift_of_a_part_is_that_of_evaluate(tmp_path):
    llama = tiny_models.tiny_llama(tmp_path / "llama", tokenizer=True)
    sae = tmp_path / "sae"
    write_saelens(random_sae(tiny_models.HIDDEN), sae)
    lines(tmp_path / "data" / "test.jsonl", *ROWS)
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    config = load_config({
        "model": str(llama), "sae": (str(sae),), "data": str(tmp_path / "data"), "top_k": 4,
        "adapter_path": str(tmp_path / "run"), "iters": 4, "batch_size": 1, "learning_rate": 2e-3,
        "max_seq_length": 64, "feature_scale": "reference",
    })  # fmt: skip
    list(pipeline.train(config, say=str))
    hidden_moves.main([str(word) for word in (
        "--model", llama, "--sae", sae, "--data", tmp_path / "data", "--adapter",
        f"own={tmp_path / 'run'}", "--parts", 0.5, 1, "--top-k", 4, "--max-seq-length", 64,
        "--output", tmp_path / "found.json",
    )])  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["points"]
    judged = pipeline.evaluate_all(
        config, adapter_paths=[str(tmp_path / "run")], scales=(0.5, 1.0), measure_kl=False, say=str
    )
    assert [one["part"] for one in found] == [0.5, 1.0]
    for one, report in zip(found, judged.adapters.values(), strict=True):
        for side in ("chosen", "rejected"):
            wanted = report.summary[f"drift/{side}"] ** 0.5
            assert one[side]["drift"] == pytest.approx(wanted, rel=1e-4)
            assert 0 < one[side]["seen"] <= 1
