"""Advice that a run gives while it trains and a report gives of it later, in the same words."""

from __future__ import annotations

from fpo_mlx.config.objective import Objective

FALLEN = "the chosen answers lost"  # how a run's warning begins


def rate_of(lr_schedule: object) -> str:
    """Where a run's learning rate is set."""
    return "the rates of lr_schedule" if lr_schedule else "--learning-rate"


def against_falling(o: Objective, rate: str) -> str:
    """For a chosen response that dies: what keeps it alive."""
    if o.nll_weight:
        return f"Lower {rate}, or raise --nll-weight above {o.nll_weight:g}"
    size = ""
    if o.link == "sigmoid":
        # as much as the preference weighs a token at u = 0: more, and little else is learnt
        size = f" {o.preference_weight * o.beta / 2 if o.length_normalize else 1.0:.3g}"
    return f"Give --nll-weight{size}, which keeps the chosen response alive, or lower {rate}"


def fallen(lost: float, o: Objective, rate: str) -> str:
    """lost: nats a token that the chosen answers lost against the reference."""
    return (
        f"{FALLEN} {lost:.3g} nats a token against the reference: text that unlikely is no longer "
        f"written, and accuracy and margin then mean nothing. {against_falling(o, rate)}, or stop "
        "earlier (fewer --iters, --early-stopping)"
    )
