"""Log-probabilities through a head that is one matrix, a tile of the vocabulary at a time.

A softmax needs only its running maximum, sum and weighted row sum, so logits [R, V] never exist:
a tile [r, TILE] is made, folded into the three and forgotten. Peak memory then depends neither on V
nor, beyond a chunk of rows, on L. The gradient is folded in the same pass, which makes two products
with the matrix in all, the least that a value and its gradient can cost.

Source: the online softmax of Milakov & Gimelshein (2018, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from fpo_mlx.core.exponential import exp_below

TILE = 2048  # columns of the vocabulary at once; also what float32 sums go over
Back = Callable[[mx.array], mx.array | None]  # weights [r, TILE] -> weighted rows of W, or nothing
ROWS = 512  # rows at once: 4 MiB of logits a tile, and MLX allocates some tiles ahead


@dataclass(frozen=True)
class Packing:
    """How a quantised matrix is stored; its first axis is the plain one's."""

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    def tile(self, columns: slice) -> Packing:
        biases = None if self.biases is None else self.biases[columns]
        return Packing(self.scales[columns], biases, self.group_size, self.bits, self.mode)

    def multiply(self, rows: mx.array, weight: mx.array, *, transpose: bool) -> mx.array:
        options: dict[str, Any] = {
            "transpose": transpose, "group_size": self.group_size, "bits": self.bits,
            "mode": self.mode,
        }  # fmt: skip
        return mx.quantized_matmul(rows, weight, self.scales, self.biases, **options)


@dataclass(frozen=True)
class LinearHead:
    """logits = cap * tanh(scale * (h W^T + b) / cap); without a cap the inner part alone."""

    weight: mx.array  # [V, D], or packed
    bias: mx.array | None = None  # [V]
    packing: Packing | None = None
    scale: float = 1.0
    cap: float = 0.0  # 0: none

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> mx.Dtype:
        """Of the matrix's values."""
        return self.weight.dtype if self.packing is None else self.packing.scales.dtype

    def tile(self, columns: slice) -> LinearHead:
        """The head of these logits only."""
        return LinearHead(
            self.weight[columns],
            None if self.bias is None else self.bias[columns],
            None if self.packing is None else self.packing.tile(columns),
            self.scale,
            self.cap,
        )

    def __call__(self, rows: mx.array) -> mx.array:
        """rows: [r, D] -> logits [r, V], in the dtype of the product."""
        logits = self._multiply(rows, transpose=True)
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.cap * mx.tanh(logits / self.cap) if self.cap else logits

    def back(self, slopes: mx.array, logits: mx.array) -> mx.array:
        """d(sum slopes * logits) / d rows. slopes, logits: [r, V] -> [r, D] float32."""
        if self.cap:
            slopes = slopes * (1.0 - (logits / self.cap) ** 2)
        out = self._multiply(slopes.astype(self.dtype), transpose=False).astype(mx.float32)
        return out if self.scale == 1.0 else out * self.scale

    def _multiply(self, rows: mx.array, *, transpose: bool) -> mx.array:
        if self.packing is not None:
            return self.packing.multiply(rows, self.weight, transpose=transpose)
        return rows @ (self.weight.T if transpose else self.weight)


class Tiled(NamedTuple):
    """Float32 constants: values [R] or [n, R], their gradients in the rows, and what was asked."""

    values: mx.array
    slopes: mx.array | None  # [R, D] or [n, R, D]; None or empty without a gradient
    log_collisions: mx.array | None  # [R], log sum_v pi(v)^2


def tiled_logps(
    rows: mx.array, targets: mx.array, head: LinearHead, *, grad: bool, collisions: bool = False
) -> Tiled:
    """Log-probs of `targets` and, with `grad`, their gradient in `rows`.

    rows: [R, D], targets: [R] int. Returns: values [R], slopes [R, D] or None.
    """
    values, slopes, squares = [], [], []
    for start in range(0, rows.shape[0], ROWS):
        part = rows[start : start + ROWS]
        if values:  # one chunk after the other
            part = mx.depends(part, [values[-1], *slopes[-1:]])
        value, slope, square = _chunk(part, targets[start : start + ROWS], head, grad, collisions)
        values.append(value)
        if slope is not None:
            slopes.append(slope)
        squares.append(square)
    joined = mx.concatenate(squares) if collisions else None
    return Tiled(mx.concatenate(values), mx.concatenate(slopes) if grad else None, joined)


def tiled_logps_and_kl(
    rows: mx.array,
    ref_rows: mx.array,
    targets: mx.array,
    head: LinearHead,
    *,
    grad: bool,
    collisions: bool = False,
) -> Tiled:
    """Log-probs of `targets` and KL(reference || policy), and their gradients in `rows`.

    rows, ref_rows: [R, D], targets: [R] int. Returns: values [2, R], slopes [2, R, D] or empty.
    """
    values, slopes, squares = [], [], []
    for start in range(0, rows.shape[0], ROWS):
        part = slice(start, start + ROWS)
        first = rows[part]
        if values:  # one chunk after the other
            first = mx.depends(first, [values[-1], slopes[-1]])
        value, slope, square = _chunk_with_kl(
            first, ref_rows[part], targets[part], head, grad, collisions
        )
        values.append(value)
        slopes.append(slope)
        squares.append(square)
    joined = mx.concatenate(squares) if collisions else None
    return Tiled(mx.concatenate(values, axis=1), mx.concatenate(slopes, axis=1), joined)


def _chunk(
    rows: mx.array, targets: mx.array, head: LinearHead, grad: bool, collisions: bool
) -> tuple[mx.array, mx.array | None, mx.array]:
    sums = _Sums.start(rows.shape[0])
    picked = mx.zeros((rows.shape[0],))
    square = mx.zeros((rows.shape[0],))  # of exp(logits - top), summed; 0 unless asked for
    for start in range(0, head.vocab_size, TILE):
        tile = head.tile(slice(start, start + TILE))
        done = [*sums, picked, square] if collisions else [*sums, picked]
        after = mx.depends(rows, done) if start else rows  # one after the other
        logits = tile(after).astype(mx.float32)  # [r, TILE]
        before = sums.top
        sums, parts = sums.add_and_parts(
            logits, lambda parts, t=tile, x=logits: t.back(parts, x) if grad else None
        )
        if collisions:
            square = _add_squares(square, parts, before, sums.top)
        picked = _pick(picked, logits, targets - start)
    values = picked - sums.log()
    slopes = _rows_of(head, targets, picked) - sums.mean() if grad else None
    return values, slopes, mx.log(square) - 2.0 * mx.log(sums.total)


def _add_squares(square: mx.array, parts: mx.array, before: mx.array, top: mx.array) -> mx.array:
    """The sum of squares with a tile more. parts: exp(logits - top); before: the top until now."""
    return square * mx.exp(2.0 * (before - top)) + mx.square(parts).sum(axis=-1)


def _chunk_with_kl(
    rows: mx.array,
    ref_rows: mx.array,
    targets: mx.array,
    head: LinearHead,
    grad: bool,
    collisions: bool,
) -> tuple[mx.array, mx.array, mx.array]:
    """KL = E_ref[ref logit - policy logit] - log-sum(ref) + log-sum(policy)."""
    n = rows.shape[0]
    policy, ref, picked = _Sums.start(n), _Sums.start(n), mx.zeros((n,))
    cross = mx.zeros((n,))  # of exp(ref logits - ref top) times (ref - policy logits)
    square = mx.zeros((n,))
    for start in range(0, head.vocab_size, TILE):
        tile = head.tile(slice(start, start + TILE))
        done = [*policy, *ref, picked, cross, *([square] if collisions else [])]
        after = mx.depends(rows, done) if start else rows
        logits = tile(after).astype(mx.float32)  # [r, TILE]
        ref_logits = tile(mx.depends(ref_rows, [after])).astype(mx.float32)

        def back(parts: mx.array, t=tile, x=logits) -> mx.array | None:
            return t.back(parts, x) if grad else None  # both pull on the policy's rows

        before = policy.top
        policy, parts = policy.add_and_parts(logits, back)
        if collisions:
            square = _add_squares(square, parts, before, policy.top)
        before, gap = ref.top, ref_logits - logits
        ref, parts = ref.add_and_parts(ref_logits, back)
        cross = cross * mx.exp(before - ref.top) + (parts * gap).sum(axis=-1)
        picked = _pick(picked, logits, targets - start)
    logs = policy.log()
    values = mx.stack([picked - logs, cross / ref.total - ref.log() + logs])
    log_collisions = mx.log(square) - 2.0 * mx.log(policy.total)
    if not grad:
        return values, mx.zeros((2, n, 0)), log_collisions
    mean = policy.mean()
    slopes = mx.stack([_rows_of(head, targets, picked) - mean, mean - ref.mean()])
    return values, slopes, log_collisions


class _Sums(NamedTuple):
    """The softmax of rows as it is folded together, tile by tile."""

    top: mx.array  # [r], the largest logit so far
    total: mx.array  # [r], sum of exp(logits - top)
    pull: mx.array  # [r, D] after the first tile: rows of W, weighted like `total`

    @classmethod
    def start(cls, n: int) -> _Sums:
        return cls(mx.full((n,), -mx.inf), mx.zeros((n,)), mx.zeros((n, 1)))

    def add_and_parts(self, logits: mx.array, back: Back) -> tuple[_Sums, mx.array]:
        """With a tile [r, TILE] more, and the tile's exp(logits - top)."""
        top = mx.maximum(self.top, logits.max(axis=-1))
        shrink, parts = mx.exp(self.top - top), exp_below(logits, top[:, None])
        slope = back(parts)
        pull = self.pull if slope is None else self.pull * shrink[:, None] + slope
        return _Sums(top, self.total * shrink + parts.sum(axis=-1), pull), parts

    def log(self) -> mx.array:
        """[r], log-sum-exp."""
        return self.top + mx.log(self.total)

    def mean(self) -> mx.array:
        """[r, D], the rows of W in expectation."""
        return self.pull / self.total[:, None]


def _pick(picked: mx.array, logits: mx.array, local: mx.array) -> mx.array:
    """The logit of each row's target where it lies in this tile. local: [r], counted from it."""
    inside = (local >= 0) & (local < logits.shape[-1])
    column = mx.clip(local, 0, logits.shape[-1] - 1)[:, None]
    return mx.where(inside, mx.take_along_axis(logits, column, axis=-1).squeeze(-1), picked)


def _rows_of(head: LinearHead, targets: mx.array, logits: mx.array) -> mx.array:
    """d logits[target] / d rows. targets, logits: [r] -> [r, D] float32."""
    weight = mx.take(head.weight, targets, axis=0)
    packing = head.packing
    if packing is not None:
        biases = None if packing.biases is None else mx.take(packing.biases, targets, axis=0)
        scales = mx.take(packing.scales, targets, axis=0)
        weight = mx.dequantize(
            weight, scales, biases, packing.group_size, packing.bits, packing.mode
        )
    slope = weight.astype(mx.float32) * head.scale
    return slope * (1.0 - (logits / head.cap) ** 2)[:, None] if head.cap else slope
