"""What `train` says of its settings before the first update."""

from __future__ import annotations

import numpy as np
import pytest

from fpo_mlx.config import TrainConfig
from fpo_mlx.records import TokenPair

pytest.importorskip("mlx.core")

from fpo_mlx.train.foresight import MANY_PASSES, many_passes, short_schedule  # noqa: E402
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


COSINE = {"name": "cosine_decay", "arguments": [2e-5, 500], "warmup": 20}
RISING = {"name": "linear_schedule", "arguments": [0, 2e-5, 100]}


@pytest.mark.parametrize(
    ("schedule", "settings", "said"),
    [
        (COSINE, {"iters": 5000}, ("update 520 of 5000", "0, and so learn nothing", "4980 long")),
        (COSINE, {"iters": 5000, "grad_accumulation_steps": 8}, ("update 520 of 625", "605 long")),
        (
            {"name": "linear_schedule", "arguments": [2e-5, 1e-6, 500]},
            {"iters": 5000},
            (
                "update 500 of 5000",
                "the other 4500 train at its last rate, 1e-06. For",
                "5000 long",
            ),
        ),
        (RISING, {"iters": 5000}, ()),  # a warm-up to a rate that stays
        ({"name": "cosine_decay", "arguments": [1e-6, 100, 2e-5]}, {"iters": 5000}, ()),
        (COSINE, {"iters": 520}, ()),
        (COSINE, {"iters": 560}, ()),  # a short rest at the end is no harm
        (COSINE, {"iters": 100}, ()),  # cut off
        ({"name": "exponential_decay", "arguments": [2e-5, 0.99]}, {"iters": 5000}, ()),
        (None, {"iters": 5000}, ()),
    ],
)
def test_a_schedule_that_ends_long_before_the_run_is_told_with_its_right_length(
    schedule, settings, said
):
    found = short_schedule(order_of(4000, lr_schedule=schedule, **settings))
    assert (found is not None) is bool(said)
    for part in said:
        assert part in str(found)


def test_the_rate_behind_the_end_is_the_one_that_is_named():
    """As the optimizer has it."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import build_schedule

    for schedule in (COSINE, {"name": "linear_schedule", "arguments": [2e-5, 1e-6, 500]}):
        rate = build_schedule(schedule)
        last = 0.0 if schedule is COSINE else 1e-6
        assert rate(mx.array(600)).item() == pytest.approx(last, abs=1e-12)
        assert rate(mx.array(400)).item() > last
