"""What an SAE sees in a response: encode, pool over the response, distance to the reference.

Pooling runs without gradient over all F features, a tile of them at a time; the distance is then
recomputed with gradient on the at most 2k selected columns only, so its cost does not depend on F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from fpo_mlx.core.parts import Parts, rows_at
from fpo_mlx.core.selection import GROUP, largest
from fpo_mlx.machine import device

LEAST_TILE = 1024  # features at once, below which a product with the encoder is slow
PER_FEATURE = (
    "w_enc", "b_enc", "threshold", "gate_scale", "gate_bias", "act_scale", "inputs",
)  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """`records.SaeWeights` as arrays of a device; w_enc is transposed so that columns are rows.

    Without an SAE a feature is one of the site's own values: there is no matrix then, only the
    numbers of the inputs that are features.
    """

    activation: str
    w_enc: mx.array | Parts | None  # [F, D_in]; None: of the kind "identity"
    b_enc: mx.array  # [F]
    b_in: mx.array | None = None  # [D_in]
    threshold: mx.array | None = None  # [F], 0 or more
    gate_scale: mx.array | None = None  # [F]
    gate_bias: mx.array | None = None  # [F]
    act_scale: mx.array | None = None  # [F]
    inputs: mx.array | None = None  # int32 [F], where w_enc is None
    k: int = 0
    normalize: str = "none"

    @property
    def n_features(self) -> int:
        return self.b_enc.shape[0]

    @property
    def signed(self) -> bool:
        """Whether activations can be negative, so that size means magnitude."""
        return self.activation in ("abstopk", "identity")

    def columns(self, indices: mx.array) -> Encoder:
        """The same encoder, of the features `indices` only (token gates must be given)."""
        return self._some(lambda array: rows_at(array, indices), self.k)

    def tile(self, features: slice) -> Encoder:
        """The same encoder, of consecutive features; of whole groups, if it has groups."""
        k = self.k
        if self.activation == "groupmax":
            k = len(range(*features.indices(self.n_features))) * k // self.n_features
        return self._some(lambda array: array[features], k)

    def _some(self, pick: Callable[[Any], mx.array], k: int) -> Encoder:
        arrays = {name: getattr(self, name) for name in PER_FEATURE}
        some = {name: None if a is None else pick(a) for name, a in arrays.items()}
        return replace(self, k=k, **some)


def normalize(rows: mx.array, mode: str) -> mx.array:
    """The SAE's input normalisation, per row. rows: [R, D] -> [R, D] float32."""
    rows = rows.astype(mx.float32)
    if mode == "layer_norm":
        centred = rows - rows.mean(axis=-1, keepdims=True)
        std = mx.sqrt((centred * centred).sum(axis=-1, keepdims=True) / (rows.shape[-1] - 1))
        return centred / (std + 1e-5)
    if mode == "constant_norm":
        return rows * (rows.shape[-1] ** 0.5 / mx.linalg.norm(rows, axis=-1, keepdims=True))
    return rows


def encoder_inputs(encoder: Encoder, rows: mx.array) -> mx.array:
    """rows: [R, D_in] -> what the encoder's matrix is applied to, [R, D_in] float32."""
    inputs = normalize(rows, encoder.normalize)
    return inputs if encoder.b_in is None else inputs - encoder.b_in


def products(encoder: Encoder, inputs: mx.array) -> tuple[mx.array, mx.array]:
    """inputs: [R, D_in] -> (raw, pre), each [R, F]; they are one but for gated SAEs."""
    if encoder.w_enc is None:
        assert encoder.inputs is not None
        pre = mx.take(inputs, encoder.inputs, axis=-1) + encoder.b_enc
        return pre, pre
    if isinstance(encoder.w_enc, Parts):
        tiles = [products(encoder.tile(own), inputs) for own in encoder.w_enc.slices()]
        raw, pre = (mx.concatenate(list(both), axis=-1) for both in zip(*tiles, strict=True))
        return raw, pre
    if encoder.activation != "gated":
        pre = mx.addmm(encoder.b_enc, inputs, encoder.w_enc.T)
        return pre, pre
    raw = inputs @ encoder.w_enc.T
    scaled = raw if encoder.gate_scale is None else raw * encoder.gate_scale
    return raw, scaled + encoder.b_enc


def token_gate(encoder: Encoder, pre: mx.array) -> mx.array | None:
    """What of a row's selection depends on its other features; constant under differentiation.

    topk, abstopk: midway between the k-th and the next largest [R, 1], so that a feature computed
    again, alone and rounded otherwise, falls on the same side. groupmax: the winner's index in
    each group [R, k].
    """
    if encoder.activation in ("topk", "abstopk"):
        size, k = _size(encoder, pre), encoder.k
        if k >= pre.shape[-1]:
            return mx.full((pre.shape[0], 1), -mx.inf)
        falling = mx.partition(-size, k, axis=-1)
        last_in, first_out = falling[:, :k].max(axis=-1), falling[:, k]  # negated
        return mx.stop_gradient((last_in + first_out)[:, None] * -0.5)
    if encoder.activation == "groupmax":
        groups = pre.reshape(pre.shape[0], encoder.k, -1)  # [R, k, F / k]
        offset = mx.arange(encoder.k) * groups.shape[-1]
        return mx.stop_gradient(mx.argmax(groups, axis=-1) + offset)
    return None


def activate(
    encoder: Encoder,
    raw: mx.array,
    pre: mx.array,
    gate: mx.array | None,
    indices: mx.array,
    group_size: int = 1,
) -> mx.array:
    """Activations of the features `indices` [F'] from their raw and pre, each [R, F']."""
    kind, threshold, bias = encoder.activation, encoder.threshold, encoder.gate_bias
    if kind == "jumprelu" and threshold is not None:  # never negative, so no ReLU is needed
        acts = _above(pre, threshold)
    elif kind == "topk" and gate is not None:
        acts = _at_least(pre, gate)
    elif kind == "gated" and bias is not None:
        acts = mx.where(raw + bias > 0, mx.maximum(pre, 0.0), 0.0)
    elif kind == "abstopk" and gate is not None:
        acts = mx.where(mx.abs(pre) >= gate, pre, 0.0)
    elif kind == "groupmax" and gate is not None:
        winner = mx.take(gate, indices // group_size, axis=1)  # [R, F']
        acts = mx.where(winner == indices, mx.maximum(pre, 0.0), 0.0)
    else:
        acts = pre if encoder.signed else mx.maximum(pre, 0.0)
    return acts if encoder.act_scale is None else acts * encoder.act_scale


@partial(mx.compile, shapeless=True)
def _at_least(pre, gate):
    return mx.where(pre >= gate, mx.maximum(pre, 0.0), 0.0)


@partial(mx.compile, shapeless=True)
def _above(pre, threshold):
    """A product, not a choice: compiled it takes half the time of mx.where on a CPU."""
    return pre * (pre > threshold)


def encode(encoder: Encoder, rows: mx.array) -> mx.array:
    """rows: [R, D_in] -> activations [R, F] float32, differentiable in `rows`.

    Features that tie for the k-th place of a top-k SAE are all kept.
    """
    raw, pre = products(encoder, encoder_inputs(encoder, rows))
    size = encoder.n_features // max(encoder.k, 1)
    gate = token_gate(encoder, pre)
    return activate(encoder, raw, pre, gate, mx.arange(encoder.n_features), size)


def pool(
    encoder: Encoder, rows: mx.array, weights: mx.array, after: Sequence[mx.array] = ()
) -> tuple[mx.array, mx.array | None]:
    """Weighted sums of activations, without gradient, a tile of the features at a time.

    rows: [R, D_in]; weights: [S, R], for means 1 / |y| on a response's own rows; after: what must
    be computed first, so that its temporaries and these are not in memory together.
    Returns: pooled [S, F] float32, and the token gates [R, ...] that `selected_means` needs.
    """
    rows, pooled, gates = mx.stop_gradient(rows), None, []
    after = [mx.stop_gradient(array) for array in after]
    one_chunk = _pool_top if encoder.activation in ("topk", "abstopk") else _pool_tiles
    at_once = device.here().pool_rows
    for start in range(0, rows.shape[0], at_once):
        chunk = slice(start, start + at_once)
        part, gate = one_chunk(encoder, rows[chunk], weights[:, chunk], after)
        pooled = part if pooled is None else pooled + part
        after = [pooled]
        gates.append(gate)
    assert pooled is not None, "no rows to pool"
    return pooled, None if gates[0] is None else mx.concatenate(gates)


def _tiles(encoder: Encoder, n_rows: int, elements: int) -> list[slice]:
    """The features in pieces of about `elements` activations; groups stay whole.

    An encoder of several arrays is cut where they are, so that none of them is copied.
    """
    size = max(LEAST_TILE, elements // n_rows // GROUP * GROUP)
    if encoder.activation == "groupmax":
        group = encoder.n_features // encoder.k
        size = max(1, size // group) * group
    parts = [slice(0, encoder.n_features)]
    if isinstance(encoder.w_enc, Parts):
        parts = encoder.w_enc.slices()
    return [
        slice(at, min(at + size, part.stop))
        for part in parts
        for at in range(part.start, part.stop, size)
    ]


def _pool_tiles(
    encoder: Encoder, rows: mx.array, weights: mx.array, after: list[mx.array]
) -> tuple[mx.array, mx.array | None]:
    """Features that do not look at each other, but within their group."""
    group = encoder.n_features // max(encoder.k, 1)
    inputs, pieces, gates = encoder_inputs(encoder, rows), [], []
    for tile in _tiles(encoder, rows.shape[0], device.here().pool_elements):
        part = encoder.tile(tile)
        raw, pre = products(part, mx.depends(inputs, after) if after else inputs)
        gate = token_gate(part, pre)
        indices = mx.arange(part.n_features)  # within the tile, as the gate's
        acts = activate(part, raw, pre, gate, indices, group)
        pieces.append(weights @ acts)  # [S, tile]
        after = [pieces[-1]]
        if gate is not None:
            gates.append(gate + tile.start)
    return mx.concatenate(pieces, axis=1), mx.concatenate(gates, axis=1) if gates else None


def _pool_top(
    encoder: Encoder, rows: mx.array, weights: mx.array, after: list[mx.array]
) -> tuple[mx.array, mx.array | None]:
    """Top-k over all features from each tile's own top k + 1; the few that fire are scattered."""
    inputs, found, places = encoder_inputs(encoder, rows), [], []
    for tile in _tiles(encoder, rows.shape[0], device.here().top_elements):
        part = encoder.tile(tile)
        _, pre = products(part, mx.depends(inputs, after) if after else inputs)
        n = min(encoder.k + 1, part.n_features)
        order = largest(_size(encoder, pre), n)
        found.append(mx.take_along_axis(pre, order, axis=-1))
        places.append(order + tile.start if tile.start else order)
        after = [found[-1], places[-1]]
    pre, indices = mx.concatenate(found, axis=1), mx.concatenate(places, axis=1)  # [R, n * tiles]
    gate = token_gate(encoder, pre)
    plain = replace(encoder, act_scale=None)
    acts = activate(plain, pre, pre, gate, indices)
    if encoder.act_scale is not None:
        acts = acts * mx.take(encoder.act_scale, indices)
    pooled = mx.zeros((weights.shape[0], encoder.n_features))
    shape = (weights.shape[0], *indices.shape)
    values = weights[:, :, None] * acts  # [S, R, n * tiles]
    sides = mx.broadcast_to(mx.arange(shape[0])[:, None, None], shape)
    return pooled.at[sides, mx.broadcast_to(indices, shape)].add(values), gate


def _size(encoder: Encoder, pre: mx.array) -> mx.array:
    return mx.abs(pre) if encoder.activation == "abstopk" else pre


def selected_means(
    encoder: Encoder, rows: mx.array, gate: mx.array | None, indices: mx.array
) -> mx.array:
    """Mean activation of the features `indices` [K] over rows [n, D_in] -> [K], differentiable."""
    some = encoder.columns(indices)
    raw, pre = products(some, encoder_inputs(some, rows))
    size = encoder.n_features // max(encoder.k, 1)
    return activate(some, raw, pre, gate, indices, size).mean(axis=0)


def top_indices(pooled: mx.array, k: int, *, magnitude: bool = False) -> mx.array:
    """Indices of the k largest entries (or largest magnitudes). [S, F] -> [S, min(k, F)]."""
    size = mx.abs(pooled) if magnitude else pooled
    return largest(size, k)


def union_indices(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """The union of index sets as one list with a mask.

    parts: (indices, mask) each [S, n_i]; within a part indices are distinct, and mask 0 leaves an
    entry out. Returns: indices [S, K] and mask [S, K] float32, K = sum of n_i; the mask is 0 too
    where an index already stands in an earlier part.
    """
    joined, mask = parts[0]
    for indices, keep in parts[1:]:
        same = (indices[:, :, None] == joined[:, None, :]) & (mask[:, None, :] > 0)
        mask = mx.concatenate([mask, keep * (1.0 - same.any(axis=-1))], axis=1)
        joined = mx.concatenate([joined, indices], axis=1)
    return joined, mask


def top_set(pooled: mx.array, k: int, *, magnitude: bool = False) -> tuple[mx.array, mx.array]:
    """`top_indices` with a mask [S, k] that leaves out silent features: zero is never "top"."""
    indices = top_indices(pooled, k, magnitude=magnitude)
    return indices, (mx.take_along_axis(pooled, indices, axis=-1) != 0).astype(mx.float32)


def distance(policy: mx.array, ref: mx.array, weights: mx.array, k: int) -> mx.array:
    """D = (1/k) sum_i w_i (policy_i - ref_i)^2 over the selected features.

    policy, ref, weights: [.., K] -> [..]; weights hold the mask of the union.
    Source: FPO (Yin et al. 2025, arXiv 2411.07618), Eq. 10.
    """
    return (weights * (policy - ref) ** 2).sum(axis=-1) / k


def reference_scale(ref: mx.array, k: int, *, magnitude: bool = False) -> mx.array:
    """Mean square of the reference's own top-k, (1/k) sum c_i^2. ref: [S, F] -> [S].

    Dividing D by it makes alpha mean the same for every SAE and every block. Where the reference is
    silent there is no scale: it is 1.
    """
    top = mx.take_along_axis(ref, top_indices(ref, k, magnitude=magnitude), axis=-1)
    scale = (top * top).sum(axis=-1) / k
    return mx.where(scale > 0, scale, 1.0)
