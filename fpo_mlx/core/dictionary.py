"""Training a sparse dictionary: selection, loss and its gradient, one Adam step. Pure functions.

The gradient is written out, not traced: only chosen entries of [n, F] matter, and a tracer would
keep copies of it. Inputs are centred and scaled by the caller to a mean square of about 1, so the
reconstruction loss reads as the fraction of variance unexplained.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv 2406.04093); BatchTopK, Bussmann et al. 2024
(2412.06410); Matryoshka, Bussmann et al. 2025 (2503.17547); JumpReLU with its straight-through
gradient, Rajamanoharan et al. 2024 (2407.14435); projected decoder gradient, Bricken et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from fpo_mlx.core.selection import largest
from fpo_mlx.core.sparse_sums import by_feature, sums
from fpo_mlx.machine import lanes

Arrays = dict[str, mx.array]  # w_enc, w_dec [F, D]; b_enc [F]; b_dec [D]; log_threshold [F]
SPARSE_ROWS = 64  # tokens whose k decoder rows are gathered at a time: they stay in the cache


@dataclass(frozen=True)
class Rule:
    """What does not change from step to step."""

    architecture: str  # topk, batchtopk, jumprelu
    k: int
    groups: tuple[int, ...]  # ends of the nested prefixes, the last is F; (F,) for a plain SAE
    bandwidth: float = 0.1  # of JumpReLU's straight-through kernel, in units of the scaled input
    aux_k: int = 256
    aux_weight: float = 1 / 32
    sparse: bool = True  # decode from k gathered rows (topk without nested prefixes)


@dataclass(frozen=True)
class Summed:
    """One micro-batch: sums over its tokens times the weight it was given."""

    grads: Arrays
    loss: mx.array  # scalar, reconstruction
    l0: mx.array  # scalar, active features of a token
    fired: mx.array  # bool [F]
    threshold: mx.array  # scalar, smallest active value; BatchTopK only, else infinite


def pre_activations(params: Arrays, x: mx.array) -> mx.array:
    """x: [n, D] -> [n, F]."""
    return (x - params["b_dec"]) @ params["w_enc"].T + params["b_enc"]


def activate(rule: Rule, params: Arrays, pre: mx.array) -> mx.array:
    """pre: [n, F] -> acts [n, F]."""
    if rule.architecture == "topk":
        index = largest(pre, rule.k)
        values = mx.maximum(mx.take_along_axis(pre, index, axis=-1), 0.0)
        return mx.put_along_axis(mx.zeros_like(pre), index, values, axis=-1)
    if rule.architecture == "batchtopk":
        flat = pre.reshape(1, -1)
        index = largest(flat, min(rule.k * pre.shape[0], flat.shape[1]))
        bound = mx.maximum(mx.take_along_axis(flat, index, axis=-1).min(), 0.0)
        return mx.where((pre >= bound) & (pre > 0), pre, 0.0)
    return mx.where(pre > mx.exp(params["log_threshold"]), pre, 0.0)


def gradients(
    rule: Rule, params: Arrays, x: mx.array, weight: float, l0_pull: mx.array, dead: mx.array | None
) -> Summed:
    """Loss and gradient of a micro-batch.

    weight: 1 / tokens of the whole batch, so that the parts of micro-batches add up.
    l0_pull: scalar, what one more active feature a token costs (JumpReLU).
    dead: int [m] features for the auxiliary loss, -1 where there is none; None to leave it out.
    """
    inputs = x - params["b_dec"]  # [n, D]
    pre = mx.addmm(params["b_enc"], inputs, params["w_enc"].T)  # [n, F]
    sparse = rule.architecture == "topk" and rule.sparse and len(rule.groups) == 1
    decode = _sparse_decode if sparse else _dense_decode
    done = decode(rule, params, inputs, pre, weight)
    grads = dict(done.grads)
    grads["b_dec"] = grads["b_dec"] - grads["b_enc"] @ params["w_enc"]
    if rule.architecture == "jumprelu":
        pull = weight * l0_pull
        grads["log_threshold"] = _threshold_gradient(rule, params, pre, done.d_acts, pull)
    if dead is not None:
        grads = _auxiliary(rule, params, inputs, pre, -done.error, dead, weight, grads)
    return Summed(grads, done.loss, done.active * weight, done.fired, done.threshold)


@dataclass(frozen=True)
class _Decoded:
    """One micro-batch on its way back from the reconstruction."""

    error: mx.array  # [n, D] of the whole reconstruction
    loss: mx.array  # scalar
    active: mx.array  # scalar, active entries
    fired: mx.array  # bool [F]
    threshold: mx.array  # scalar, see Summed
    grads: Arrays  # b_dec's without its part by the encoder's input
    d_acts: mx.array | None = None  # [n, F], silent features included; for the thresholds


def _square(rows: mx.array) -> mx.array:
    """Sum of squares, as a product of the flat array with itself: one pass."""
    flat = rows.flatten()
    return flat @ flat


def _sparse_decode(
    rule: Rule, params: Arrays, inputs: mx.array, pre: mx.array, weight: float
) -> _Decoded:
    """Top-k on a CPU: 8 k D operations a token where dense takes 8 F D.

    Each chosen decoder row is read once for the error and for the slopes, and nothing but `pre` is
    as large as [n, F].
    """
    scale, share = 2.0 * weight / inputs.shape[1], weight / inputs.shape[1]
    parts = []
    for number, rows in enumerate(lanes.shares(inputs.shape[0], SPARSE_ROWS)):
        with lanes.lane(number):
            parts.append(_decode_chosen(rule, params, inputs[rows], pre[rows]))
    index, values, error, slopes = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    live = values > 0
    d_pre = slopes * live * scale  # [n, k]
    entries = by_feature(index, pre.shape[1])
    w_dec, w_enc = sums(entries, [(values * scale, error), (d_pre, inputs)], rule.k)
    nothing = mx.zeros((pre.shape[1],))
    grads = {
        "w_dec": w_dec, "w_enc": w_enc, "b_dec": error.sum(axis=0) * scale,
        "b_enc": nothing.at[index].add(d_pre),
    }  # fmt: skip
    fired = nothing.at[index].maximum(live.astype(mx.float32)) > 0
    loss = _square(error) * share
    return _Decoded(error, loss, live.sum(), fired, mx.array(mx.inf), grads)


def _decode_chosen(
    rule: Rule, params: Arrays, inputs: mx.array, pre: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """(indices [n, k], activations [n, k], error [n, D], error along each decoder row [n, k])."""
    index = largest(pre, rule.k)
    values = mx.maximum(mx.take_along_axis(pre, index, axis=-1), 0.0)
    errors, slopes = [], []
    for start in range(0, inputs.shape[0], SPARSE_ROWS):
        part = slice(start, start + SPARSE_ROWS)
        chosen = mx.depends(index[part], slopes[-1]) if slopes else index[part]  # in turn
        rows = params["w_dec"][chosen]  # [c, k, D]
        error = (values[part, None, :] @ rows)[:, 0] - inputs[part]  # [c, D]
        slopes.append((rows @ error[:, :, None])[..., 0])  # [c, k]
        errors.append(error)
    return index, values, mx.concatenate(errors), mx.concatenate(slopes)


def _dense_decode(
    rule: Rule, params: Arrays, inputs: mx.array, pre: mx.array, weight: float
) -> _Decoded:
    """Mean loss over nested prefixes; a prefix reconstructs with the features below its end."""
    acts = activate(rule, params, pre)
    w_dec, starts = params["w_dec"], (0, *rule.groups[:-1])
    parts = [slice(a, b) for a, b in zip(starts, rule.groups, strict=True)]
    error, errors = -inputs, []
    for part in parts:
        error = error + acts[:, part] @ w_dec[part]
        errors.append(error)
    share = weight / (inputs.shape[1] * len(parts))
    loss = sum((_square(e) for e in errors), mx.array(0.0)) * share
    later, d_dec, d_acts = mx.zeros_like(error), [], []
    for part, e in zip(reversed(parts), reversed(errors), strict=True):
        later = later + e * (2.0 * share)  # what this and all wider prefixes are off by
        d_dec.append(acts[:, part].T @ later)
        d_acts.append(later @ w_dec[part].T)
    live, slopes = acts > 0, mx.concatenate(d_acts[::-1], axis=1)
    d_pre = slopes * live
    grads = {
        "w_dec": mx.concatenate(d_dec[::-1]), "b_dec": later.sum(axis=0),
        "w_enc": d_pre.T @ inputs, "b_enc": d_pre.sum(axis=0),
    }  # fmt: skip
    batchtopk = rule.architecture == "batchtopk"
    threshold = mx.where(live, acts, mx.inf).min() if batchtopk else mx.array(mx.inf)
    return _Decoded(error, loss, live.sum(), live.any(axis=0), threshold, grads, slopes)


def _threshold_gradient(
    rule: Rule, params: Arrays, pre: mx.array, d_acts: mx.array | None, pull: mx.array
) -> mx.array:
    """Of log_threshold, [F]: rectangle kernel of the given bandwidth (2407.14435, Eq. 11, 12)."""
    threshold = mx.exp(params["log_threshold"])
    near = mx.abs(pre - threshold) < rule.bandwidth / 2
    assert d_acts is not None
    slope = mx.where(near, d_acts * threshold + pull, 0.0).sum(axis=0)
    return -threshold * slope / rule.bandwidth


def _auxiliary(
    rule: Rule,
    params: Arrays,
    inputs: mx.array,
    pre: mx.array,
    rest: mx.array,
    dead: mx.array,
    weight: float,
    grads: Arrays,
) -> Arrays:
    """Dead features learn what the living ones leave over; nothing else moves by it.

    rest: [n, D] x minus its reconstruction, held constant.
    """
    rows = mx.maximum(dead, 0)
    spare = mx.where(dead >= 0, mx.maximum(mx.take(pre, rows, axis=1), 0.0), 0.0)  # [n, m]
    if rule.aux_k < spare.shape[1]:
        index = largest(spare, rule.aux_k)
        chosen = mx.take_along_axis(spare, index, axis=-1)
        spare = mx.put_along_axis(mx.zeros_like(spare), index, chosen, axis=-1)
    w_dec = mx.take(params["w_dec"], rows, axis=0)
    error = spare @ w_dec - rest
    error = error * (2.0 * weight * rule.aux_weight / rest.shape[1])
    d_pre = mx.where(spare > 0, error @ w_dec.T, 0.0)
    added = {"w_dec": spare.T @ error, "w_enc": d_pre.T @ inputs, "b_enc": d_pre.sum(axis=0)}
    return grads | {name: grads[name].at[rows].add(part) for name, part in added.items()}


def add_parts(parts: Sequence[Summed]) -> Summed:
    """Micro-batches of one batch."""
    if len(parts) == 1:
        return parts[0]
    first, *rest = parts
    grads, loss, l0 = first.grads, first.loss, first.l0
    fired, least = first.fired, first.threshold
    for part in rest:
        grads = {name: grads[name] + value for name, value in part.grads.items()}
        loss, l0 = loss + part.loss, l0 + part.l0
        fired, least = fired | part.fired, mx.minimum(least, part.threshold)
    return Summed(grads, loss, l0, fired, least)


B1, B2, EPSILON, TINY = 0.9, 0.999, 1e-8, 1e-30
THRESHOLD_RATE = 10.0  # times the learning rate: a threshold has far to go, on a log scale


def _adam(p, g, m, v, rate, fix1, fix2):
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * (g * g)
    return p - rate * (m * fix1) / (mx.sqrt(v * fix2) + EPSILON), m, v


_step = mx.compile(_adam)


def _decoder_step(w, g, m, v, rate, fix1, fix2):
    """Rows keep length 1: no step along a row, and its length put back.

    Not compiled as a whole: MLX's CPU compiler is slow where a column meets a matrix.
    """
    w, m, v = _step(w, g - mx.einsum("fd,fd->f", g, w)[:, None] * w, m, v, rate, fix1, fix2)
    square = mx.maximum(mx.einsum("fd,fd->f", w, w), TINY)  # a row of zeros has no direction
    return w * mx.rsqrt(square)[:, None], m, v


def adam_step(
    params: Arrays, grads: Arrays, first: Arrays, second: Arrays, rate: float, step: int
) -> tuple[Arrays, Arrays, Arrays]:
    """One Adam update (Kingma & Ba 2015); step counts from 1. Returns params and both moments."""
    fixes = (1 / (1 - B1**step), 1 / (1 - B2**step))  # in double: 1 - 0.999 loses 4 digits in float
    numbers = [mx.array(number) for number in (rate, *fixes)]
    new: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    for i, name in enumerate(sorted(params, key=lambda name: -params[name].size)):
        update = _decoder_step if name == "w_dec" else _step
        own = [numbers[0] * THRESHOLD_RATE if name == "log_threshold" else numbers[0], *numbers[1:]]
        with lanes.lane(i):
            done = update(params[name], grads[name], first[name], second[name], *own)
        for into, array in zip(new, done, strict=True):
            into[name] = array
    return new
