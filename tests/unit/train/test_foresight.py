"""What `train` says of its settings before the first update."""

from __future__ import annotations

import numpy as np
import pytest

from fpo_mlx.config import TrainConfig
from fpo_mlx.records import TokenPair

pytest.importorskip("mlx.core")

from fpo_mlx.train.foresight import MANY_PASSES, many_passes  # noqa: E402
from fpo_mlx.train.order import Order  # noqa: E402


def order_of(count: int, **settings) -> Order:
    token = np.zeros(1, np.int32)
    return Order([TokenPair(token, token, token, i) for i in range(count)], TrainConfig(**settings))


@pytest.mark.parametrize(
    ("count", "settings", "passes"),
    [
        (300, {"iters": 1000, "batch_size": 4}, 1000 / 75),
        (300, {"iters": 1000, "batch_size": 4, "grad_accumulation_steps": 2}, 500 / 38),
        (10, {"epochs": 1.0, "batch_size": 4}, 1.0),  # three updates, the last one of two pairs
        (10, {"epochs": 2.0, "batch_size": 4, "grad_accumulation_steps": 3}, 2.0),
        (300, {"iters": 3, "batch_size": 1}, 0.01),
    ],
)
def test_a_pass_is_every_pair_once(count, settings, passes):
    """--batch-size is that of all processes together."""
    assert order_of(count, **settings).passes == pytest.approx(passes)


def test_many_passes_are_warned_of_unless_validations_end_them():
    assert many_passes(order_of(100, epochs=MANY_PASSES)) is None
    said = many_passes(order_of(300))
    assert said is not None
    assert said.startswith("13.3 passes over 300 pairs")
    assert "--epochs" in said
    assert many_passes(order_of(300, early_stopping=3)) is None
