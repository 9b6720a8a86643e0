"""scripts/studies/forward_curve.py: what it reads out of a run's log."""

from __future__ import annotations

import forward_curve
import pytest
from command_line import lines


def test_minutes_are_those_of_the_updates_before_a_validation(tmp_path):
    """10 pairs at 0.5 and 20 at 0.25 per second: 20 s and 80 s more."""
    valid = {"kind": "valid", "loss": 0.5, "metrics": {"rewards/accuracies": 0.75}}
    lines(
        tmp_path / "metrics.jsonl",
        {**valid, "iteration": 0},
        {"kind": "train", "pairs": 10, "pairs_per_second": 0.5},
        {"kind": "train", "pairs": 30, "pairs_per_second": 0.25},
        {**valid, "iteration": 30, "loss": 0.25},
    )
    first, last = forward_curve.curve(tmp_path)
    assert first == {"update": 0, "minutes": 0.0, "loss": 0.5, "accuracy": 0.75}
    assert last == {
        "update": 30,
        "minutes": pytest.approx(100 / 60),
        "loss": 0.25,
        "accuracy": 0.75,
    }
