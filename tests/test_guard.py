"""What ends a run: reasons by hand, from figures alone."""

from __future__ import annotations

import numpy as np
import pytest

from fpo_mlx import guard
from fpo_mlx.config import Objective, TrainConfig

CONFIG, FPO = TrainConfig(max_margin=50.0, max_logp_drop=5.0), Objective(beta=0.1)


def values(u=(0.0, 0.0), change=(0.0, 0.0), loss=(0.6931, 0.6931)):
    return {
        "u": np.array(u),
        "logps_per_token/chosen_change": np.array(change),
        "loss": np.array(loss),
    }


def test_a_quiet_update_is_let_through():
    assert guard.divergence(values(), 1.0, CONFIG, FPO) is None


@pytest.mark.parametrize(
    ("seen", "grad_norm", "reason"),
    [
        (values(loss=(0.5, np.nan)), 1.0, "not finite"),
        (values(), np.inf, "not finite"),
        (values(u=(0.0, -10.2)), 1.0, "margin is 51 nats a token, over --max-margin 50"),
        (values(change=(1.0, -11.2)), 1.0, "fell 5.1 nats a token"),
    ],
)
def test_each_kind_of_divergence_has_its_reason(seen, grad_norm, reason):
    """|u| / beta is a mean over pairs: 10.2 / 0.1 / 2 = 51; the drop is (11.2 - 1) / 2 = 5.1."""
    found = guard.divergence(seen, grad_norm, CONFIG, FPO)
    assert found is not None
    assert reason in found


def test_a_margin_of_sums_is_not_bounded_a_token():
    sums = Objective(beta=0.1, length_normalize=False)
    assert guard.divergence(values(u=(100.0, 100.0)), 1.0, CONFIG, sums) is None


def test_step_zero_speaks_of_the_gap_in_nats():
    gap = guard.policy_gap(np.array([0.001, -0.02]), FPO)
    assert gap == pytest.approx(0.2)
    assert "up to 0.2 nats" in (guard.another_policy(gap) or "")
    assert guard.another_policy(0.05) is None
    assert guard.gap_warnings(0.0009, FPO) == []
    assert "0.002" in guard.gap_warnings(0.002, FPO)[0]


def test_a_gradient_of_zero_trains_nothing():
    assert guard.no_gradient(1e-9) is None
    assert "gradient is zero" in (guard.no_gradient(0.0) or "")
