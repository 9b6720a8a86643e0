"""What an SAE sees in a response: encode, pool over the response, distance to the reference.

Pooling runs without gradient over all F features in row chunks; the distance is then recomputed
with gradient on the at most 2k selected columns only, so its cost does not depend on F.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from fpo_mlx.core.logprobs import row_chunks

ENCODE_ELEMENTS = 1 << 22  # activations alive at once: 16 MiB in float32


@dataclass(frozen=True)
class Encoder:
    """`records.SaeWeights` as arrays of a device; w_enc is transposed so that columns are rows."""

    activation: str
    w_enc: mx.array  # [F, D_in]
    b_enc: mx.array  # [F]
    b_in: mx.array | None = None  # [D_in]
    threshold: mx.array | None = None  # [F]
    gate_scale: mx.array | None = None  # [F]
    gate_bias: mx.array | None = None  # [F]
    act_scale: mx.array | None = None  # [F]
    k: int = 0
    normalize: str = "none"

    @property
    def n_features(self) -> int:
        return self.w_enc.shape[0]

    @property
    def signed(self) -> bool:
        """Whether activations can be negative, so that size means magnitude."""
        return self.activation in ("abstopk", "identity")

    def columns(self, indices: mx.array) -> Encoder:
        """The same encoder, of the features `indices` only (token gates must be given)."""

        def some(array: mx.array | None) -> mx.array | None:
            return None if array is None else mx.take(array, indices, axis=0)

        return Encoder(
            activation=self.activation,
            w_enc=mx.take(self.w_enc, indices, axis=0),
            b_enc=mx.take(self.b_enc, indices, axis=0),
            b_in=self.b_in,
            threshold=some(self.threshold),
            gate_scale=some(self.gate_scale),
            gate_bias=some(self.gate_bias),
            act_scale=some(self.act_scale),
            k=self.k,
            normalize=self.normalize,
        )


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


def pre_activations(encoder: Encoder, rows: mx.array) -> tuple[mx.array, mx.array]:
    """rows: [R, D_in] -> (raw, pre), each [R, F]; they differ for gated SAEs only by gate_scale."""
    inputs = normalize(rows, encoder.normalize)
    if encoder.b_in is not None:
        inputs = inputs - encoder.b_in
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
        size = mx.abs(pre) if encoder.activation == "abstopk" else pre
        k = encoder.k
        if k >= pre.shape[-1]:
            return mx.full((pre.shape[0], 1), -mx.inf)
        falling = mx.partition(-size, k, axis=-1)
        last_in, first_out = -falling[:, :k].max(axis=-1), -falling[:, k]
        return mx.stop_gradient((last_in + first_out)[:, None] / 2)
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
    acts = pre if encoder.signed else mx.maximum(pre, 0.0)
    if kind == "jumprelu" and threshold is not None:
        acts = mx.where(pre > threshold, acts, 0.0)
    elif kind == "gated" and bias is not None:
        acts = mx.where(raw + bias > 0, acts, 0.0)
    elif kind == "topk" and gate is not None:
        acts = mx.where(pre >= gate, acts, 0.0)
    elif kind == "abstopk" and gate is not None:
        acts = mx.where(mx.abs(pre) >= gate, acts, 0.0)
    elif kind == "groupmax" and gate is not None:
        winner = mx.take(gate, indices // group_size, axis=1)  # [R, F']
        acts = mx.where(winner == indices, acts, 0.0)
    return acts if encoder.act_scale is None else acts * encoder.act_scale


def encode(encoder: Encoder, rows: mx.array) -> mx.array:
    """rows: [R, D_in] -> activations [R, F] float32, differentiable in `rows`.

    Features that tie for the k-th place of a top-k SAE are all kept.
    """
    raw, pre = pre_activations(encoder, rows)
    size = encoder.n_features // max(encoder.k, 1)
    gate = token_gate(encoder, pre)
    return activate(encoder, raw, pre, gate, mx.arange(encoder.n_features), size)


def pool(encoder: Encoder, rows: mx.array, weights: mx.array) -> tuple[mx.array, mx.array | None]:
    """Weighted sums of activations, without gradient.

    rows: [R, D_in]; weights: [S, R], for means 1 / |y| on a response's own rows.
    Returns: pooled [S, F] float32, and the token gates [R, ...] that `selected_means` needs.
    """
    rows = mx.stop_gradient(rows)
    pooled, gates = mx.zeros((weights.shape[0], encoder.n_features)), []
    everything = mx.arange(encoder.n_features)
    size = encoder.n_features // max(encoder.k, 1)
    for part in row_chunks(rows.shape[0], encoder.n_features, ENCODE_ELEMENTS):
        chunk = mx.depends(rows[part], pooled) if part.start else rows[part]  # one after the other
        raw, pre = pre_activations(encoder, chunk)  # [r, F]
        gate = token_gate(encoder, pre)
        acts = activate(encoder, raw, pre, gate, everything, size)
        pooled = pooled + weights[:, part] @ acts
        gates.append(gate)
    return pooled, None if gates[0] is None else mx.concatenate(gates)


def selected_means(
    encoder: Encoder, rows: mx.array, gate: mx.array | None, indices: mx.array
) -> mx.array:
    """Mean activation of the features `indices` [K] over rows [n, D_in] -> [K], differentiable."""
    some = encoder.columns(indices)
    raw, pre = pre_activations(some, rows)
    size = encoder.n_features // max(encoder.k, 1)
    return activate(some, raw, pre, gate, indices, size).mean(axis=0)


def top_indices(pooled: mx.array, k: int, *, magnitude: bool = False) -> mx.array:
    """Indices of the k largest entries (or largest magnitudes). [S, F] -> [S, min(k, F)]."""
    size = mx.abs(pooled) if magnitude else pooled
    k = min(k, pooled.shape[-1])
    return mx.argpartition(-size, k - 1, axis=-1)[:, :k]


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

    Dividing D by it makes alpha mean the same for every SAE and every block.
    """
    top = mx.take_along_axis(ref, top_indices(ref, k, magnitude=magnitude), axis=-1)
    return mx.maximum((top * top).sum(axis=-1) / k, 1e-12)
