"""One objective for the whole family; every named method is a choice of its arguments.

u = beta [lr(y_w) - lr(y_l)] - delta            margin = "reference" (dpo, tdpo, fpo)
u = beta [lp(y_w) - lp(y_l)] - gamma - delta    margin = "constant"  (simpo)
delta = alpha beta [C(y_l) - sg C(y_w)],  loss = -log sigmoid(u)

Features that the user names are held on the chosen response too: delta + alpha beta [P - sg P], P
their part of C(y_w), which adds nothing to the value and their pull to the gradient.

lp is a response's log-prob, summed or divided by its length; lr = lp - the reference's; C is the
constraint: the feature distance D (fpo), the sequential KL (tdpo, simpo-kl), or none.
Source: FPO (arXiv 2411.07618), Table 1 and Eq. 11; TDPO (arXiv 2404.11999); SimPO (2405.14734).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class PairLosses(NamedTuple):
    """One value per pair, none averaged."""

    losses: mx.array  # [B]
    u: mx.array  # [B]
    chosen_rewards: mx.array  # [B] beta x the (normalised) log-ratio to the reference
    rejected_rewards: mx.array  # [B]


def preference_losses(
    policy_logps: mx.array,
    ref_logps: mx.array,
    lengths: mx.array,
    penalties: mx.array | None,
    *,
    beta: float,
    alpha: float | mx.array,
    gamma: float,
    length_normalize: bool,
    margin: str,
    stop_gradient: bool,
    held: mx.array | None = None,
) -> PairLosses:
    """The loss of each pair; the caller takes the mean.

    policy_logps, ref_logps: [2, B] nats summed per response (0 chosen, 1 rejected);
    lengths: [2, B] tokens; penalties: [2, B], C of each response, or None; alpha: one number or
    [B]; held: [B], P of the chosen responses, or None. Returns: four [B].
    """
    scale = 1.0 / lengths if length_normalize else mx.ones_like(policy_logps)
    policy, ratio = policy_logps * scale, (policy_logps - ref_logps) * scale  # [2, B]
    u = beta * (ratio[0] - ratio[1]) if margin == "reference" else beta * (policy[0] - policy[1])
    u = u - (gamma if margin == "constant" else 0.0)
    if penalties is not None:
        chosen = mx.stop_gradient(penalties[0]) if stop_gradient else penalties[0]
        u = u - alpha * beta * (penalties[1] - chosen)
    if held is not None:
        u = u - alpha * beta * (held - mx.stop_gradient(held))
    rewards = mx.stop_gradient(beta * ratio)
    return PairLosses(-nn.log_sigmoid(u), u, rewards[0], rewards[1])
