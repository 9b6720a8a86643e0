"""When a run must not go on: pure functions of figures and settings -> a reason, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fpo_mlx.config import Objective, TrainConfig

SAME_POLICY = 0.05  # |u| / beta in nats (a token, if normalised) at which step 0 is refused


def no_gradient(grad_norm: float) -> str | None:
    """Before the first update: a gradient of zero trains nothing."""
    if grad_norm != 0.0:
        return None
    return (
        "step 0: the gradient is zero, so nothing would be trained. Check that the "
        "adapted layers (lora_parameters.keys, --num-layers) lie on the way to the loss."
    )


def policy_gap(u: np.ndarray, objective: Objective) -> float:
    """The largest |u| / beta, in nats (a token, if normalised); 0 where policy = reference."""
    return float(np.abs(u).max()) / objective.beta


def another_policy(gap: float) -> str | None:
    """Before the first update policy and reference are one model. gap: `policy_gap`."""
    if gap <= SAME_POLICY:
        return None
    return (
        f"step 0: the policy is not the reference. Their margins differ by up to {gap:.3g} "
        f"nats, wanted less than {SAME_POLICY}: the loss would not start at ln 2. Run "
        "`fpo-mlx precompute` with this model and adapter, or drop --reference."
    )


def gap_warnings(gap: float, objective: Objective) -> list[str]:
    """What is said where the reference was scored elsewhere: another machine, another dtype."""
    close = 1e-3 if objective.length_normalize else 1e-2
    if gap > close:
        return [f"step 0: |u| / beta is {gap:.2g}; the reference was computed otherwise"]
    return []


def divergence(
    values: Mapping[str, np.ndarray], grad_norm: float, config: TrainConfig, objective: Objective
) -> str | None:
    """Why an update must not be made. values: [B] each, as `reports.pair_metrics` names them."""
    u = float(np.abs(values["u"]).mean()) / objective.beta
    drop = -float(values["logps_per_token/chosen_change"].mean())
    if not (np.isfinite(values["loss"]).all() and math.isfinite(grad_norm)):
        return "the loss or its gradient is not finite"
    if objective.length_normalize and u > config.max_margin:
        return f"the margin is {u:.3g} nats a token, over --max-margin {config.max_margin}"
    if drop > config.max_logp_drop:
        return (
            f"the chosen log-prob fell {drop:.3g} nats a token below the reference's, over "
            f"--max-logp-drop {config.max_logp_drop}"
        )
    return None
