"""Every kernel of ours on the device under test, against plain numpy or the CPU.

Inputs of the sparse dictionaries are small integers, so that sums are exact in any order and in
TF32 too: no feature may fall on the other side of its threshold by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from fpo_mlx.core import dictionary, features, logprobs, selection
from fpo_mlx.core.linear_head import LinearHead, Packing
from fpo_mlx.machine import device
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.pipeline.device_check.lines import Line
from fpo_mlx.pipeline.device_check.places import Size, float_bits, on_cpu, under_test
from fpo_mlx.records import Activation, SaeWeights
from fpo_mlx.sae.encode import encode

KINDS: tuple[Activation, ...] = ("relu", "jumprelu", "gated", "topk", "abstopk", "groupmax")
HEADS = ("4 bits", "mxfp4", "bfloat16", "float32")
TRAINED = ("topk", "batchtopk", "jumprelu")
CAP = 30.0  # Gemma's
EXACT, ROUNDED = 1e-4, 5e-3  # relative, of sums of float32 products: whole, and as TF32
Array = np.ndarray


def lines(size: Size) -> Iterator[Line]:
    """Differences are relative to the largest value."""
    bits = float_bits()
    yield Line("kernels", "bits of a float32 product's factors", bits)
    allowed = EXACT if bits == 23 else ROUNDED
    with device.using(_cut(under_test(), size)):
        for kind in HEADS:
            yield Line("kernels", f"head and loss, {kind}", _loss(size, kind), allowed)
        yield Line("kernels", "KL", _kl(size), allowed)
        for kind in KINDS:
            yield Line("kernels", f"pooling, {kind}", _pooling(size, kind), allowed / 5)
        yield Line("kernels", "features with gradient", _selected(size), allowed / 5)
        yield Line("kernels", "top-k, rows of another set", _largest(size), 0.0)
        for kind in TRAINED:
            yield Line("kernels", f"SAE training, {kind}", _trained(size, kind), allowed)


def _cut(record: device.Device, size: Size) -> device.Device:
    """So that rows come in several chunks and features in several tiles."""
    return replace(
        record,
        row_elements=size.vocab * max(1, size.rows // 2),
        pool_elements=size.features * size.rows // 4,
        top_elements=size.features * size.rows // 4,
        wide_elements=size.vocab * size.hidden // 3,
    )


# The head and the loss -----------------------------------------------------------------------


def _draw(size: Size, seed: int) -> tuple[Array, Array, Array]:
    """Rows [R, D], a matrix [V, D] that makes logits of about 2, and targets [R]."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((size.rows, size.hidden), np.float32)
    weight = rng.standard_normal((size.vocab, size.hidden), np.float32)
    weight *= 2.0 / size.hidden**0.5
    return rows, weight, rng.integers(0, size.vocab, size.rows).astype(np.int32)


def _head(weight: Array, kind: str) -> LinearHead:
    """Packed and rounded on the CPU, so that both sides have the same numbers."""
    with on_cpu():
        plain = mx.array(weight)
        if kind in ("bfloat16", "float32"):
            head = LinearHead(plain.astype(getattr(mx, kind)), cap=CAP)
        elif kind == "mxfp4":
            packed = mx.quantize(plain, group_size=32, bits=4, mode="mxfp4")
            head = LinearHead(packed[0], packing=Packing(packed[1], None, 32, 4, "mxfp4"), cap=CAP)
        else:
            packed = mx.quantize(plain, group_size=64, bits=4)
            packing = Packing(packed[1], packed[2], 64, 4, "affine")
            head = LinearHead(packed[0], packing=packing, cap=CAP)
        mx.eval([head.weight, *(vars(head.packing).values() if head.packing else [])])
    return head


def _plain(head: LinearHead) -> Array:
    """Its matrix in float32, [V, D]."""
    with on_cpu():
        packing = head.packing
        if packing is None:
            return np.array(head.weight.astype(mx.float32))
        return np.array(
            mx.dequantize(
                head.weight, packing.scales, packing.biases, packing.group_size, packing.bits,
                packing.mode,
            ).astype(mx.float32)
        )  # fmt: skip


def _logits(rows: Array, weight: Array) -> tuple[Array, Array]:
    """Capped logits in double precision, and their slope by what is under the cap."""
    inner = np.tanh((rows @ weight.T).astype(np.float64) / CAP)
    return CAP * inner, 1.0 - inner**2


def _log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _loss(size: Size, kind: str) -> float:
    """The worse of log-probs and their gradients by the rows."""
    rows, weight, targets = _draw(size, 1)
    head = _head(weight, kind)
    weight = _plain(head)
    logits, inner = _logits(rows, weight)
    log, at = _log_softmax(logits), np.arange(len(rows))
    pulls = -np.exp(log)
    pulls[at, targets] += 1.0
    want = (log[at, targets], (pulls * inner).astype(np.float32) @ weight)
    return _off(_value_and_slopes(head, rows, targets), want)


def _kl(size: Size) -> float:
    """The worse of KL(reference || policy) and its gradient; through a float32 head."""
    rows, weight, targets = _draw(size, 2)
    ref = rows + 0.3 * np.random.default_rng(3).standard_normal(rows.shape, np.float32)
    logits, inner = _logits(rows, weight)
    log, ref_log = _log_softmax(logits), _log_softmax(_logits(ref, weight)[0])
    pulls = ((np.exp(log) - np.exp(ref_log)) * inner).astype(np.float32)
    want = ((np.exp(ref_log) * (ref_log - log)).sum(axis=-1), pulls @ weight)
    return _off(_value_and_slopes(_head(weight, "float32"), rows, targets, ref), want)


def _value_and_slopes(
    head: LinearHead, rows: Array, targets: Array, ref: Array | None = None
) -> tuple[Array, Array]:
    """What the device makes of it: [R], and [R, D]."""

    def value(hidden: mx.array) -> mx.array:
        found = logprobs.token_values(
            hidden, mx.array(targets), head, head.vocab_size,
            ref_hidden=None if ref is None else mx.array(ref),
        )  # fmt: skip
        return found.logps if found.kl is None else found.kl

    (values,), (slopes,) = mx.vjp(value, [mx.array(rows)], [mx.ones(len(rows))])
    return np.array(values), np.array(slopes)


def _off(got: tuple[Array, ...], want: tuple[Array, ...]) -> float:
    """The largest difference, relative to the largest value wanted; the worst of the arrays."""
    differences = [np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want, strict=True)]
    return float(np.max(differences))  # not a number stays


# Sparse dictionaries --------------------------------------------------------------------------


def _sae(size: Size, kind: Activation) -> SaeWeights:
    """Integers, and for every feature an own fraction, so that no two activations tie."""
    rng = np.random.default_rng(4)
    f, d = size.features, size.hidden
    w_enc = rng.integers(-2, 3, (d, f)).astype(np.float32)
    spread = float(np.sqrt(d) * 2.0)  # of an activation, about
    b_enc = ((rng.permutation(f) + 0.5) / (2 * f)).astype(np.float32)
    extra: dict = {}
    if kind == "jumprelu":
        extra["threshold"] = np.round(np.abs(rng.normal(size=f)) * spread).astype(np.float32)
    elif kind == "gated":
        extra["gate_scale"] = 2.0 ** rng.integers(-1, 2, f).astype(np.float32)
        extra["gate_bias"] = np.round(rng.normal(size=f) * spread).astype(np.float32) + 0.5
    elif kind in ("topk", "abstopk"):
        extra["k"] = f // 32
    elif kind == "groupmax":
        extra["k"] = f // 16
    return SaeWeights(kind, w_enc, b_enc, **extra)


def _integers(size: Size) -> tuple[Array, Array]:
    """Rows [R, D] of integers, and the weights [2, R] of two responses' means."""
    rows = np.random.default_rng(5).integers(-2, 3, (size.rows, size.hidden)).astype(np.float32)
    half = size.rows // 2  # a power of two: means are exact
    return rows, np.repeat(np.eye(2, dtype=np.float32), half, axis=1) / half


def _pooling(size: Size, kind: Activation) -> float:
    sae, (rows, weights) = _sae(size, kind), _integers(size)
    want = weights.astype(np.float64) @ encode(sae, rows)
    got, _ = features.pool(encoder_of(sae), mx.array(rows), mx.array(weights))
    return _off((np.array(got),), (want,))


def _selected(size: Size) -> float:
    """Mean activations of chosen features, and their gradient by the rows."""
    sae, (rows, _) = _sae(size, "jumprelu"), _integers(size)
    rng = np.random.default_rng(6)
    chosen = rng.choice(size.features, 64, replace=False)
    pull = rng.integers(-2, 3, 64).astype(np.float32)
    encoder = encoder_of(sae)

    def means(inputs: mx.array) -> mx.array:
        return features.selected_means(encoder, inputs, None, mx.array(chosen.astype(np.int32)))

    (got,), (slope,) = mx.vjp(means, [mx.array(rows)], [mx.array(pull)])
    acts = encode(sae, rows)[:, chosen]
    wanted_slope = ((acts > 0) * pull / len(rows)) @ sae.w_enc[:, chosen].T
    return _off((np.array(got), np.array(slope)), (acts.mean(axis=0, dtype=float), wanted_slope))


def _largest(size: Size) -> float:
    """Rows whose k largest are other ones than numpy's."""
    k, rng = 50, np.random.default_rng(7)
    values = np.stack([rng.permutation(size.features) for _ in range(size.rows)]).astype(np.float32)
    got = np.sort(np.array(selection.largest(mx.array(values), k)), axis=1)
    want = np.sort(np.argsort(values, axis=1)[:, -k:], axis=1)
    return float((got != want).any(axis=1).sum())


def _trained(size: Size, kind: str) -> float:
    """All gradients of one micro-batch of SAE training, against those of the CPU."""
    f, d, rng = size.features // 4, size.hidden, np.random.default_rng(8)
    k = f // 32
    drawn = {
        "w_enc": rng.integers(-2, 3, (f, d)), "w_dec": rng.integers(-2, 3, (f, d)) / d,
        "b_enc": (rng.permutation(f) + 0.5) / (2 * f), "b_dec": np.zeros(d),
        "log_threshold": np.full(f, np.log(2.0 * np.sqrt(d))),
    }  # fmt: skip
    x = rng.integers(-2, 3, (size.rows, d)).astype(np.float32)

    def gradients() -> tuple[Array, ...]:
        params = {name: mx.array(value.astype(np.float32)) for name, value in drawn.items()}
        rule = dictionary.Rule(kind, k, (f,), sparse=device.here().sparse_decode)
        parts = dictionary.gradients(
            rule, params, mx.array(x), 1.0 / len(x), mx.array(0.01), dead=None
        )
        every = [parts.grads[name] for name in sorted(parts.grads)]
        mx.eval(every)
        return tuple(np.array(array) for array in every)

    got = gradients()
    with on_cpu():
        want = gradients()
    return _off(got, want)
