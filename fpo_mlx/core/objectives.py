"""One objective for the whole family; every named method is a choice of its arguments.

z(y) = lp, lp / |y|, or log-odds of exp(lp / |y|)    lp: a response's log-prob, |y|: its tokens
r(y) = beta [z(y) - z_ref(y) + alpha C(y)]           margin = "reference" (dpo, tdpo, fpo, ipo, …)
r(y) = beta [z(y) + alpha C(y)]                      margin = "constant"  (simpo, cpo, orpo, asft)
u    = r(y_w) - r(y_l) - gamma - m (s_w - s_l)       C(y_w) under a stop-gradient
loss = w {kappa v [p link(u) + (1 - p) link(-u)] + lambda (-lp_w / |y_w|)}

C is the constraint: the feature distance D (fpo), the sequential KL (tdpo, simpo-kl), or none.
Features that the user names are held on the chosen response too: r(y_w) - alpha beta [P - sg P], P
their part of C(y_w), which adds nothing to the value and their pull to the gradient.
A link (`core.links`) is a function of u, or of the two r that u is made of. p: how sure the row's
label is, 1 if it does not say; w: the row's weight; s: its scores; v: WPO's weight; kappa, lambda:
weights of the preference and of the likelihood of the chosen response.

Source: FPO (arXiv 2411.07618), Table 1 and Eq. 11; TDPO (2404.11999); SimPO (2405.14734).
lambda: RPO (2404.19733), CPO (2401.08417, Eq. 7). Label smoothing: cDPO, and its robust form
(2403.00409, Eq. 12). Score margin: ODPO (2402.10571). v: WPO (2406.11827, Eq. 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from fpo_mlx.core.links import LINKS


class Choices(Protocol):
    """What makes one method of the family; `config.Objective` is one, and says what each does."""

    @property
    def beta(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def length_normalize(self) -> bool: ...
    @property
    def log_odds(self) -> bool: ...
    @property
    def margin(self) -> str: ...
    @property
    def stop_gradient(self) -> bool: ...
    @property
    def link(self) -> str: ...
    @property
    def link_arguments(self) -> Mapping[str, float]: ...
    @property
    def preference_weight(self) -> float: ...  # kappa
    @property
    def nll_weight(self) -> float: ...  # lambda
    @property
    def label_smoothing(self) -> float: ...
    @property
    def robust_smoothing(self) -> bool: ...
    @property
    def score_margin(self) -> float: ...  # m


class Seen(NamedTuple):
    """What is at hand of B pairs; [2, B] are chosen and rejected, log-probs nats per response."""

    logps: mx.array  # [2, B]
    ref_logps: mx.array  # [2, B]
    lengths: mx.array  # [2, B] tokens
    penalties: mx.array | None = None  # [2, B], C of each response
    held: mx.array | None = None  # [B], P of the chosen responses
    agreement: mx.array | None = None  # [B], p
    weights: mx.array | None = None  # [B], w
    score_gaps: mx.array | None = None  # [B], s_w - s_l
    alphas: mx.array | float | None = None  # [B] or one number, where it is not the objective's
    log_collisions: mx.array | None = None  # [2, B], sum over tokens of log sum_v pi(v)^2: WPO's


class PairLosses(NamedTuple):
    """One value per pair, none averaged."""

    losses: mx.array  # [B]
    u: mx.array  # [B]
    chosen_rewards: mx.array  # [B] beta x the (normalised) log-ratio to the reference
    rejected_rewards: mx.array  # [B]


def preference_losses(seen: Seen, o: Choices, held_at: Seen | None = None) -> PairLosses:
    """The loss of each pair; the caller takes the mean. Returns: four [B].

    held_at: where the values come from that a stop-gradient holds, if not from `seen`: so that a
    slope can be taken by differences too.
    """
    still = held_at or seen
    per_token = seen.logps / seen.lengths  # [2, B]
    scale = 1.0 / seen.lengths if o.length_normalize else mx.ones_like(per_token)
    ratio = (seen.logps - seen.ref_logps) * scale
    chosen, rejected = o.beta * _scores(seen, o, scale, ratio)
    alpha = o.alpha if still.alphas is None else still.alphas
    if seen.penalties is not None:
        fixed = cast(mx.array, still.penalties)
        on_chosen = mx.stop_gradient(fixed[0]) if o.stop_gradient else seen.penalties[0]
        chosen = chosen + alpha * o.beta * on_chosen
        rejected = rejected + alpha * o.beta * seen.penalties[1]
    if seen.held is not None:
        at = mx.stop_gradient(cast(mx.array, still.held))
        chosen = chosen - alpha * o.beta * (seen.held - at)
    rejected = rejected + (o.gamma if o.margin == "constant" else 0.0)
    if seen.score_gaps is not None and o.score_margin:
        rejected = rejected + o.score_margin * seen.score_gaps
    losses = mx.zeros_like(chosen)
    if o.preference_weight:
        losses = o.preference_weight * _soft(chosen, rejected, seen, o)
    if still.log_collisions is not None:
        losses = losses * policy_weights(still.logps, still.log_collisions, seen.lengths)
    if o.nll_weight:
        losses = losses - o.nll_weight * per_token[0]
    if seen.weights is not None:
        losses = losses * seen.weights
    rewards = mx.stop_gradient(o.beta * ratio)
    return PairLosses(losses, chosen - rejected, rewards[0], rewards[1])


def _scores(seen: Seen, o: Choices, scale: mx.array, ratio: mx.array) -> mx.array:
    """z - z_ref, or z alone where the margin is constant. [2, B]"""
    if not o.log_odds:
        return ratio if o.margin == "reference" else seen.logps * scale
    own = log_odds(seen.logps / seen.lengths)
    return own - log_odds(seen.ref_logps / seen.lengths) if o.margin == "reference" else own


def log_odds(logp: mx.array) -> mx.array:
    """log p - log(1 - p) of p = exp(logp); p is taken as 1 - 1e-7 at most.

    Source: ORPO (arXiv 2403.07691), Eq. 4, of the mean token log-prob.
    """
    logp = mx.minimum(logp, -1e-7)
    return logp - mx.log(-mx.expm1(logp))


def _soft(chosen: mx.array, rejected: mx.array, seen: Seen, o: Choices) -> mx.array:
    """p link(u) + (1 - p) link(-u), p as `how_sure` has it; link(u) alone where all p are 1."""
    link, arguments = LINKS[o.link], o.link_arguments
    right = how_sure(seen.agreement, o)
    first = link(chosen, rejected, o.beta, **arguments)
    if right is None:
        return first
    return right * first + (1.0 - right) * link(rejected, chosen, o.beta, **arguments)


def how_sure(agreement: mx.array | None, o: Choices) -> mx.array | float | None:
    """p of every pair with label smoothing e: a + e - 2 a e, or (a - e) / (1 - 2 e) if robust.

    agreement: [B], a, or None for 1. The second undoes what flips of rate e do to the mean loss,
    and may leave [0, 1]. None where nothing is in doubt.
    """
    e = o.label_smoothing
    if agreement is None and not e:
        return None
    a = 1.0 if agreement is None else agreement
    return (a - e) / (1.0 - 2.0 * e) if o.robust_smoothing else a + e - 2.0 * a * e


def policy_weights(logps: mx.array, log_collisions: mx.array, lengths: mx.array) -> mx.array:
    """WPO's weight of each pair, a constant: how likely the policy itself is to write it. [B]

    exp of the mean of log pi(y_t) - log sum_v pi(v)^2 over tokens, of both responses; 1 at most.
    """
    adjusted = ((logps - log_collisions) / lengths).sum(axis=0)
    return mx.stop_gradient(mx.minimum(mx.exp(adjusted), 1.0))
