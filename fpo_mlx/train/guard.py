"""When a run must not go on: pure functions of figures and settings -> a reason, or None."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fpo_mlx.config import Objective, TrainConfig, advice
from fpo_mlx.core.objectives import Seen, preference_losses
from fpo_mlx.records import COLLAPSE, PairScore

SAME_LOSS = 1e-4  # of 1 + the loss; float32 holds it to 1e-6
SAME_U = 1e-5  # of beta, if that is above 1
HALF_WIDER = 2.0  # how much wider the start's bound is where cache or model is half precision
NOISE = 1e-5  # nats per token: what float32 leaves
FEW = 16  # tokens that an update's chosen responses count as at least: two words alone may fall far
TOLD = 1e-3  # nats per token: a gap at the start that is mentioned


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
    *,
    half: bool = False,
) -> Verdict:
    """Before the first update policy and reference are one model, and something can be learnt.

    values: [B] each, as `metrics.pair_metrics` names them, without dropout; refs: the reference's
    scores of the same pairs; grad_norm: of the first update; half: model or cache is rounded to
    half precision.
    """
    if grad_norm == 0.0 and not _satisfied(values, o):
        return Verdict(
            "step 0: the gradient is zero, so nothing would be trained. Check that the "
            "adapted layers (lora_parameters.keys, --num-layers) lie on the way to the loss."
        )
    if not (np.isfinite(values["loss"]).all() and math.isfinite(grad_norm)):
        return Verdict()  # `divergence` speaks of it
    gap, apart = gaps(values, refs, o)
    bound *= HALF_WIDER if half else 1.0
    if gap > bound or apart > bound:
        reason = _another_model(values, closed_form(refs, values, o)[0].mean(), gap, apart, bound)
        return Verdict(reason)
    if (wrong := _miscalculated(values, refs, o)) > 0.0:
        return Verdict(
            f"step 0: the loss is not what the objective makes of its log-probs: it is off by "
            f"{wrong:.3g}. This is a fault of fpo-mlx or of the MLX installed here; run "
            "`fpo-mlx doctor` and report it."
        )
    if gap > TOLD:
        note = (
            f"step 0: |u| / beta is off by {gap:.2g} nats per token; the reference was computed "
            "otherwise"
        )
        return Verdict(notes=(note,))
    return Verdict()


def one_length(grad_norm: float, config: TrainConfig, o: Objective) -> str | None:
    """A note where clipping leaves of each update's only pair no more than a direction.

    A likelihood term has a direction of its own, so there the weights still count.
    """
    bound = config.max_grad_norm
    if config.pairs_per_update > 1 or not bound or grad_norm <= bound or o.nll_weight:
        return None
    return (
        f"one pair per update, and its gradient of norm {grad_norm:.3g} is clipped to "
        f"{bound:g} (--max-grad-norm): what the objective weighs a pair by (its margin, label "
        "smoothing, agreement, weight) changes nothing. Several pairs per update (--batch-size "
        "4), or --max-grad-norm 0, let it count"
    )


def parted_twins(config: TrainConfig) -> str | None:
    """A note where rows that turn each other round (`data.mirrored`) cannot share an update."""
    if config.pairs_per_update % 2 == 0:
        return None
    return (
        f"rows that turn each other round (--reward-augmented) are parted by updates of "
        f"{config.pairs_per_update}: what both say of the answers then drowns the wanted score. "
        "Take an even --batch-size, 16 or more"
    )


def short_steps(o: Objective, config: TrainConfig) -> str:
    """What is said once where steps had to become shorter for the drift that was asked for."""
    kl, drift = o.target_kl, o.target_drift
    asked = f"--target-kl {kl:g}" if drift is None else f"--target-drift {drift:g}"
    return (
        f"{asked} is less than what the optimizer's steps cause by themselves, so alpha "
        "stays where it is and the steps become shorter (`step` in the reports). With "
        f"{rate_of(config)} lowered it begins there; a larger target leaves more to learn"
    )


def _another_model(
    values: Mapping[str, np.ndarray], want: float, gap: float, apart: float, bound: float
) -> str:
    """What says that the reference is not the model that is trained. want: the loss it begins at"""
    kind, found = ("margins", gap) if gap > bound else ("log-probs", apart)
    text = (
        f"step 0: the policy is not the reference. Their {kind} differ by up to {found:.3g} nats "
        f"per token, wanted less than {bound:g} (--max-start-gap)"
    )
    if gap > bound:
        named = " (ln 2)" if abs(want - math.log(2)) < 1e-6 else ""
        text += f": the loss would start at {values['loss'].mean():.4f}, not at {want:.4f}{named}"
    return f"{text}. Run `fpo-mlx precompute` with this model and adapter, or drop --reference."


def _satisfied(values: Mapping[str, np.ndarray], o: Objective) -> bool:
    """Whether no pair of an update has anything to teach: weights of 0, hinges already passed."""
    idle = values["weights"] == 0 if "weights" in values else np.zeros(len(values["u"]), bool)
    if o.link == "hinge" and not o.nll_weight:
        idle = idle | (values["u"] >= 1)
    return bool(idle.all())


def gaps(
    values: Mapping[str, np.ndarray], refs: Sequence[PairScore], o: Objective
) -> tuple[float, float]:
    """How far policy and reference are apart before any update; both 0 where they are one.

    Returns: the largest |u| / beta, u less its closed form, and the largest difference of a
    response's log-prob, both in nats per token (where u sums, of the pair's longer response).
    """
    off = np.abs(values["u"] - closed_form(refs, values, o)[1]) / o.beta
    if not o.length_normalize:
        off = off / np.array([max(side.tokens for side in ref) for ref in refs])
    gap = float(off.max())
    sides = ("logps_per_token/chosen_change", "logps_per_token/rejected_change")
    return gap, max(float(np.abs(values[side]).max()) for side in sides)


def closed_form(
    refs: Sequence[PairScore],
    values: Mapping[str, np.ndarray],
    o: Objective,
    moved: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and u of every pair while policy = reference, [B] each, in float64.

    ln 2 and 0 for a sigmoid of margins to the reference; what the pair's own facts and log-probs
    leave for the others. Every constraint is a distance to the reference, so it is 0 there.
    values: the facts of the pairs, where there are any. moved: [2, B], the policy's log-probs less
    the reference's.
    """
    with mx.stream(mx.cpu):  # no other device has float64
        logps, tokens = (
            np.array([[getattr(side, name) for side in ref] for ref in refs], np.float64).T
            for name in ("logps", "tokens")
        )
        seen = {"logps": logps + moved, "ref_logps": logps, "lengths": tokens}
        seen |= {
            name: values[name] for name in ("agreement", "weights", "score_gaps") if name in values
        }
        if "log_collisions/chosen" in values:
            sides = [values[f"log_collisions/{side}"] for side in ("chosen", "rejected")]
            seen["log_collisions"] = np.stack(sides)
        arrays = {k: mx.array(v.astype(np.float64), mx.float64) for k, v in seen.items()}
        found = preference_losses(Seen(**arrays), o)
        mx.eval(found)
    return np.array(found.losses), np.array(found.u)


def noise(
    values: Mapping[str, np.ndarray], refs: Sequence[PairScore], o: Objective, dtype: str
) -> str | None:
    """What rounding left between policy and reference in the first update; None for nothing.

    values: of the pass with gradient, without dropout, before any update.
    """
    loss, want = float(values["loss"].mean()), float(closed_form(refs, values, o)[0].mean())
    gap, apart = gaps(values, refs, o)
    if max(gap, apart) <= NOISE:
        return None
    return (
        f"rounding of {dtype}: the first loss is {loss:.5f}, its closed form {want:.5f}; |u| / "
        f"beta up to {gap:.1g}, log-probs up to {apart:.1g} nats per token"
    )


def _miscalculated(
    values: Mapping[str, np.ndarray], refs: Sequence[PairScore], o: Objective
) -> float:
    """How far the worst loss is from its value in float64, 0 if that is rounding."""
    changes = [values[f"logps_per_token/{side}_change"] for side in ("chosen", "rejected")]
    tokens = np.array([[side.tokens for side in ref] for ref in refs]).T
    want, u = closed_form(refs, values, o, np.stack(changes) * tokens)
    same_u = np.abs(values["u"] - u) <= SAME_U * max(1.0, o.beta)  # else a constraint is not 0
    wrong = np.abs(values["loss"] - want) * same_u
    return float(np.where(wrong > SAME_LOSS * (1.0 + np.abs(want)), wrong, 0.0).max())


@dataclass(frozen=True)
class Trouble:
    """Why an update must not be made, and what helps against it."""

    what: str
    remedy: str


def rate_of(config: TrainConfig) -> str:
    """Where a run's learning rate is set."""
    return advice.rate_of(config.lr_schedule)


def against_infinity(config: TrainConfig) -> str:
    """For figures that are not finite."""
    warm = "warm it up longer (warmup)" if config.lr_schedule else "warm it up (lr_schedule)"
    return f"Lower {rate_of(config)}, {warm}, or set --max-grad-norm where it is 0"


def divergence(
    values: Mapping[str, np.ndarray], tokens: np.ndarray, grad_norm: float, config: TrainConfig,
    objective: Objective,
) -> Trouble | None:  # fmt: skip
    """Why an update must not be made.

    values: [B] each, as `metrics.pair_metrics` names them; tokens: of the chosen responses, [B].
    """
    u = float(np.abs(values["u"]).mean()) / objective.beta
    drop = -float(values["logps_per_token/chosen_change"] @ tokens) / max(tokens.sum(), FEW)
    if not (np.isfinite(values["loss"]).all() and math.isfinite(grad_norm)):
        return Trouble("the loss or its gradient is not finite", against_infinity(config))
    if objective.length_normalize and u > config.max_margin:
        return Trouble(
            f"the margin is {u:.3g} nats a token, over --max-margin {config.max_margin:g}",
            _against_margins(objective, config),
        )
    if drop > config.max_logp_drop:
        return Trouble(
            f"the chosen log-prob fell {drop:.3g} nats a token below the reference's, over "
            f"--max-logp-drop {config.max_logp_drop:g}",
            advice.against_falling(objective, rate_of(config)),
        )
    return _too_far(values, config, objective)


def _against_margins(o: Objective, config: TrainConfig) -> str:
    """For a margin that grows without end: what ends it."""
    if o.constraint == "none":
        held = "hold the policy with --constraint features or kl"
    else:
        held = _hold_harder(o)
    other = "" if o.link == "ipo" else ", or take --link ipo, which wants a margin and no more"
    return f"Lower {rate_of(config)}, {held}{other}"


def _hold_harder(o: Objective) -> str:
    for name, target in (("drift", o.target_drift), ("kl", o.target_kl)):
        if target is not None:
            return f"lower --target-{name} below {target:g}"
    return f"raise --alpha above {o.alpha:g}"


def fallen(means: Mapping[str, float], config: TrainConfig, o: Objective) -> str | None:
    """A warning where the chosen responses lost so much that a collapse is near; no end yet."""
    lost = -means["logps_per_token/chosen_change"]
    if not lost > COLLAPSE:
        return None
    return advice.fallen(lost, o, rate_of(config))


def _too_far(
    values: Mapping[str, np.ndarray], config: TrainConfig, objective: Objective
) -> Trouble | None:
    """D of the chosen or the rejected responses, mean over pairs, past the user's bound."""
    bound = config.max_feature_distance
    for side in ("chosen", "rejected"):
        far = values.get(f"features/{side}")
        if bound is not None and far is not None and far.mean() > bound:
            return Trouble(
                f"the feature distance D of the {side} responses is {far.mean():.3g}, over "
                f"--max-feature-distance {bound:g}",
                f"Lower {rate_of(config)}, or {_hold_harder(objective)}",
            )
    return None


def too_many(skipped_in_a_row: int, config: TrainConfig) -> bool:
    """Whether leaving out updates is no way on any more."""
    return config.on_divergence == "stop" or skipped_in_a_row >= config.max_skipped_updates


def stale(validations: int, config: TrainConfig) -> bool:
    """Whether so many validations without a better loss end the run."""
    return config.early_stopping is not None and validations >= config.early_stopping


def all_finite(arrays: Iterable[mx.array]) -> bool:
    """One evaluation for all of them: a - a is 0 but where a is infinite or no number."""
    return sum(((a - a).sum() for a in arrays), mx.array(0.0)).item() == 0.0
