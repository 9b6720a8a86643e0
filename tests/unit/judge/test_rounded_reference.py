"""A reference that was scored in half precision: what its rounding left wins no pair."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("mlx.core")

from command_line import ROWS, lines, run, train, usual  # noqa: E402
from evaluated import K, place  # noqa: E402, F401
from helpers import log_of  # noqa: E402

from fpo_mlx import cache  # noqa: E402

OFF = 3e-4  # of a log-prob, as bfloat16 leaves them


@pytest.fixture(scope="module")
def rounded(place, tmp_path_factory):
    """The user's cache folder; chosen answers are less likely there than they are."""
    root = tmp_path_factory.mktemp("rounded")
    lines(root / "data" / "valid.jsonl", *ROWS)
    made = run("precompute", *usual(place), "--output", root / "exact")
    assert made.exit_code == 0, made.stderr
    identity = cache.read_identity(root / "exact")
    exact = cache.open_cache(root / "exact", identity)
    half = cache.Provenance("bfloat16", "torch")
    for own in (identity, replace(identity, saes=())):  # `fuse` compares without the SAE
        scores = cache.open_cache(root / "exact", own)
        rows = [(key, scores.get(key)) for key in exact.keys()]  # noqa: SIM118
        rows[::2] = [(k, replace(score, logps=score.logps * (1 + OFF))) for k, score in rows[::2]]
        folder = root / "user-cache" / "reference" / own.digest()[:16]
        cache.open_cache(folder, own, create=True, made=half).append(rows)
    return root


@pytest.fixture(autouse=True)
def half_cache(rounded, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(rounded / "user-cache"))


def test_a_part_of_nothing_wins_no_pair_in_evaluate(place, tmp_path):
    words = ["--split", "valid", "--top-k", K, "--samples", 0, "--json", tmp_path / "e.json"]
    words += ["--adapter-path", place / "one", "--adapter-scale", 0]
    done = run("evaluate", *usual(place), *words)
    assert done.exit_code == 0, done.stderr
    assert "scoring" not in done.stderr
    found = json.loads((tmp_path / "e.json").read_text())["summary"]
    assert found["rewards/margins"] > 0
    assert found["rewards/accuracies"] == 0


def test_a_part_of_nothing_wins_no_pair_beside_a_fused_model(place, tmp_path):
    words = ["fuse", "--model", place / "model", "--adapter-path", place / "one"]
    words += ["--adapter-scale", 0, "--verify", place / "data", "--save-path", tmp_path / "fused"]
    done = run(*words, "--json", tmp_path / "fused.json")
    assert done.exit_code == 0, done.stderr
    assert "scoring" not in done.stderr
    found = json.loads((tmp_path / "fused.json").read_text())
    for side in ("before", "after"):
        assert found[side]["rewards/margins"] > 0
        assert found[side]["rewards/accuracies"] == 0


def test_the_first_update_wins_no_pair_either(place, tmp_path):
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    done = train(place, tmp_path / "run", "--batch-size", 4, data=tmp_path / "data")
    assert done.exit_code == 0, done.stderr
    assert "scoring" not in done.stderr
    first = log_of(tmp_path / "run")[0]["metrics"]
    assert first["rewards/margins"] > 0
    assert first["rewards/accuracies"] == 0
