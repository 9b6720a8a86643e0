"""What one feature is: where it fires, what it writes, what is like it. Pure, but for `watch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.core import features as F
from fpo_mlx.judge.feature_report import Context, effect_size
from fpo_mlx.judge.feature_scan import Strongest, encoded
from fpo_mlx.judge.scaling import Scaling
from fpo_mlx.model.heads import find_backbone
from fpo_mlx.model.policy import Policy
from fpo_mlx.records import Passage, Site

BINS = 20  # of the histogram
WRITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")  # what the head can read
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Activity:
    """Figures of one model. counts: of the active positions, in BINS equal bins from 0 to `top`."""

    tokens: int
    density: float  # share of the positions at which it is active
    texts: float  # share of the texts in which it is, anywhere
    mean_active: float  # mean of |activation| where it is active
    largest: float
    chosen: float  # mean over chosen answers of the mean in an answer
    rejected: float
    counts: list[int]
    top: float


def watch(
    policies: Sequence[Policy],
    encoder: F.Encoder,
    texts: Iterable[Passage],
    feature: int,
    count: int,
    decode: Decode,
    scaling: Scaling | None = None,
) -> tuple[list[list[np.ndarray]], list[Context]]:
    """One pass of every model: per model the activations of each text [n]; where the last fires.

    count: texts in which it fires most; scaling: is given the tokens of both models.
    """
    values: list[list[np.ndarray]] = [[] for _ in policies]
    best = Strongest(count)
    for text in texts:
        rows = [one.answer_rows(text.prompt, text.response).tapped[0] for one in policies]
        acts = [encoded(encoder, one) for one in rows]
        if scaling is not None:
            scaling.add([np.array(one.astype(mx.float32)) for one in rows], acts)
        for of_model, one in zip(values, acts, strict=True):
            of_model.append(one[:, feature].copy())
        best.add(values[-1][-1], text)
    return values, best.contexts(decode)


def activity(values: Sequence[np.ndarray], top: float) -> Activity:
    """values: per text its activations [n], of chosen and rejected in turn.

    top: of the histogram, shared by models.
    """
    every = np.abs(np.concatenate(values))
    active = every[every > 0]
    means = np.array([one.mean() for one in values])
    counts, _ = np.histogram(active, bins=BINS, range=(0.0, top or 1.0))
    return Activity(
        tokens=len(every),
        density=float(len(active) / len(every)),
        texts=float(np.mean([bool(one.any()) for one in values])),
        mean_active=float(active.mean()) if len(active) else 0.0,
        largest=float(every.max()),
        chosen=float(means[0::2].mean()),
        rejected=float(means[1::2].mean()),
        counts=counts.tolist(),
        top=top,
    )


def moved(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean change of a response's mean, paired Cohen's d)."""
    change = np.array([b.mean() - a.mean() for a, b in zip(before, after, strict=True)])
    return float(change.mean()), effect_size(change)


def similar(w_dec: np.ndarray, feature: int, count: int) -> list[tuple[int, float]]:
    """The features whose decoder rows lie closest to this one's, by cosine. w_dec: [F, D]."""
    lengths = np.linalg.norm(w_dec, axis=1)
    products = w_dec @ w_dec[feature]
    below = lengths * lengths[feature]
    cosines = np.divide(products, below, out=np.zeros_like(products), where=below > 0)
    cosines[feature] = -2.0
    order = np.argsort(-cosines, kind="stable")[: min(count, len(cosines) - 1)]
    return [(int(i), float(cosines[i])) for i in order]


def logit_weights(policy: Policy, site: Site, row: np.ndarray) -> np.ndarray | None:
    """What one unit of a decoder row [D] adds to each logit on the direct path to the head, [V].

    The final norm's gain is in it, its division by the length is not (as Neuronpedia and SAELens
    show it). None where the site does not write into the stream, which alone the head reads.
    """
    if site.kind not in WRITES:
        return None
    gain, centred = _final_gain(policy.model, len(row))
    direction = row - row.mean() if centred else row
    rows = mx.array(np.stack([direction * gain, np.zeros_like(row)])).astype(policy.dtype)
    there, without = np.array(policy.head(rows).astype(mx.float32))
    said = np.isfinite(without)  # -inf at ids that are no tokens (Phi-3-small)
    return np.subtract(there, without, out=np.zeros_like(there), where=said)


def _final_gain(model: nn.Module, width: int) -> tuple[np.ndarray, bool]:
    """(gain [D] of the norm before the head, whether it takes the mean out).

    Asked of the norm itself by rows of +1 and -1, since some models keep the gain as 1 + weight.
    """
    norms = [
        module
        for module in find_backbone(model).children().values()
        if isinstance(module, nn.Module)
        and isinstance(module.get("weight"), mx.array)
        and module["weight"].shape == (width,)
    ]
    if not norms:
        return np.ones(width, np.float32), False
    signs = mx.array(np.where(np.arange(width) % 2, -1.0, 1.0).astype(np.float32))[None]
    both = norms[-1](mx.concatenate([signs, -signs])).astype(mx.float32)
    gain = (both[0] - both[1]) / 2 * signs[0]
    return np.array(gain), isinstance(norms[-1], nn.LayerNorm)


def extremes(
    weights: np.ndarray, count: int, decode: Decode
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(tokens that are promoted most, those that are suppressed most), each with its weight."""
    order = np.argsort(-weights, kind="stable")
    picked = order[:count], order[::-1][:count]
    up, down = ([(decode([int(i)]), float(weights[i])) for i in one] for one in picked)
    return up, down
