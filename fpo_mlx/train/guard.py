"""When a run must not go on: pure functions of figures and settings -> a reason, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fpo_mlx.config import Objective, TrainConfig
from fpo_mlx.records import PairScore

SAME_LOSS = 1e-4  # nats; float32 holds the loss to 1e-6


@dataclass(frozen=True)
class Verdict:
    """What the look at step 0 found: a reason to stop, or notes."""

    reason: str | None = None
    notes: tuple[str, ...] = ()


def first_step(
    values: Mapping[str, np.ndarray],
    refs: Sequence[PairScore],
    grad_norm: float,
    o: Objective,
    bound: float = TrainConfig.max_start_gap,
) -> Verdict:
    """Before the first update policy and reference are one model, and something can be learnt.

    values: [B] each, as `reports.pair_metrics` names them, without dropout; refs: the reference's
    scores of the same pairs; grad_norm: of the first update.
    """
    if grad_norm == 0.0:
        return Verdict(
            "step 0: the gradient is zero, so nothing would be trained. Check that the "
            "adapted layers (lora_parameters.keys, --num-layers) lie on the way to the loss."
        )
    if not (np.isfinite(values["loss"]).all() and math.isfinite(grad_norm)):
        return Verdict()  # `divergence` speaks of it
    want = closed_form(refs, o)
    gap, apart = gaps(values, refs, o)
    advice = "Run `fpo-mlx precompute` with this model and adapter, or drop --reference."
    if gap > bound:
        return Verdict(
            f"step 0: the policy is not the reference. Their margins differ by up to {gap:.3g} "
            f"nats, wanted less than {bound:g} (--max-start-gap): the loss would start at "
            f"{values['loss'].mean():.4f}, not at {_loss(want).mean():.4f}"
            f"{' (ln 2)' if o.margin == 'reference' else ''}. {advice}"
        )
    if apart > bound:
        return Verdict(
            f"step 0: the policy is not the reference. Their log-probs differ by up to {apart:.3g} "
            f"nats a token, wanted less than {bound:g} (--max-start-gap). {advice}"
        )
    wrong = float(np.abs(values["loss"] - _loss(values["u"])).max())
    if wrong > SAME_LOSS:
        return Verdict(
            f"step 0: the loss is not -log sigmoid(u): it is off by {wrong:.3g} nats. This is a "
            "fault of fpo-mlx or of the MLX installed here; run `fpo-mlx doctor` and report it."
        )
    if gap > (1e-3 if o.length_normalize else 1e-2):
        note = f"step 0: |u| / beta is off by {gap:.2g}; the reference was computed otherwise"
        return Verdict(notes=(note,))
    return Verdict()


def gaps(
    values: Mapping[str, np.ndarray], refs: Sequence[PairScore], o: Objective
) -> tuple[float, float]:
    """How far policy and reference are apart before any update; both 0 where they are one.

    Returns: the largest |u| / beta, u less its closed form, in nats (a token, if normalised), and
    the largest difference of a response's log-prob in nats a token.
    """
    gap = float(np.abs(values["u"] - closed_form(refs, o)).max()) / o.beta
    sides = ("logps_per_token/chosen_change", "logps_per_token/rejected_change")
    return gap, max(float(np.abs(values[side]).max()) for side in sides)


def closed_form(refs: Sequence[PairScore], o: Objective) -> np.ndarray:
    """u of every pair while policy = reference, [B]: 0, or what a constant margin leaves.

    Every constraint is a distance to the reference, so it is 0 there.
    """
    if o.margin == "reference":
        return np.zeros(len(refs))
    scaled = [
        [side.logps / (side.tokens if o.length_normalize else 1) for side in ref] for ref in refs
    ]
    chosen, rejected = np.array(scaled).T
    return o.beta * (chosen - rejected) - o.gamma


def _loss(u: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, -u)


def divergence(
    values: Mapping[str, np.ndarray], grad_norm: float, config: TrainConfig, objective: Objective
) -> str | None:
    """Why an update must not be made. values: [B] each, as `reports.pair_metrics` names them."""
    u = float(np.abs(values["u"]).mean()) / objective.beta
    drop = -float(values["logps_per_token/chosen_change"].mean())
    if not (np.isfinite(values["loss"]).all() and math.isfinite(grad_norm)):
        return "the loss or its gradient is not finite"
    if objective.length_normalize and u > config.max_margin:
        return f"the margin is {u:.3g} nats a token, over --max-margin {config.max_margin:g}"
    if drop > config.max_logp_drop:
        return (
            f"the chosen log-prob fell {drop:.3g} nats a token below the reference's, over "
            f"--max-logp-drop {config.max_logp_drop:g}"
        )
    return _too_far(values, config.max_feature_distance)


def _too_far(values: Mapping[str, np.ndarray], bound: float | None) -> str | None:
    """D of the chosen or the rejected responses, mean over pairs, past the user's bound."""
    for side in ("chosen", "rejected"):
        far = values.get(f"features/{side}")
        if bound is not None and far is not None and far.mean() > bound:
            return (
                f"the feature distance D of the {side} responses is {far.mean():.3g}, over "
                f"--max-feature-distance {bound:g}"
            )
    return None


def too_many(skipped_in_a_row: int, config: TrainConfig) -> bool:
    """Whether leaving out updates is no way on any more."""
    return config.on_divergence == "stop" or skipped_in_a_row >= config.max_skipped_updates


def stale(validations: int, config: TrainConfig) -> bool:
    """Whether so many validations without a better loss end the run."""
    return config.early_stopping is not None and validations >= config.early_stopping
