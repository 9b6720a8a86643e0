"""Log-probabilities through a head that is one matrix, a tile of the vocabulary at a time.

A softmax needs only its running maximum, sum and weighted row sum, so logits [R, V] never exist:
a tile [r, tile] is made, folded into the three and forgotten. Peak memory then depends neither on V
nor, beyond a chunk of rows, on L. The gradient is folded in the same pass, which makes two products
with the matrix in all, the least that a value and its gradient can cost.

Source: the online softmax of Milakov & Gimelshein (2018, arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

from fpo_mlx.core import whole_rows, wide_tiles
from fpo_mlx.core.exponential import exp_below
from fpo_mlx.core.linear_head import LinearHead
from fpo_mlx.machine import device

Back = Callable[[mx.array], mx.array | None]  # weights [r, tile] -> weighted rows of W, or nothing


class Tiled(NamedTuple):
    """Float32 constants: values [R] or [n, R], their gradients in the rows, and what was asked."""

    values: mx.array
    slopes: mx.array | None  # [R, D] or [n, R, D]; None without a gradient
    log_collisions: mx.array | None  # [R], log sum_v pi(v)^2


def tiled(
    rows: mx.array,
    targets: mx.array,
    head: LinearHead,
    *,
    ref_rows: mx.array | None = None,
    grad: bool,
    collisions: bool = False,
) -> Tiled:
    """Log-probs of `targets`, with `ref_rows` KL(reference || policy), too, and with `grad` their
    gradients in `rows`.

    rows, ref_rows: [R, D], targets: [R] int. Returns: values [R] (with the KL [2, R]), slopes
    [R, D] ([2, R, D]) or None.
    """
    plan, alone = _Plan.of(head, rows.shape[0]), ref_rows is None
    sides = [plan.filled(x.astype(mx.float32)) for x in (rows, ref_rows) if x is not None]
    targets, one_chunk = plan.filled(targets), plan.one_chunk(alone)
    values, slopes, squares = [], [], []
    for part in plan.chunks:
        some = [side[part] for side in sides]
        if values:  # one chunk after the other
            some[0] = mx.depends(some[0], [values[-1], *slopes[-1:]])
        value, slope, square = one_chunk(*some, targets[part], plan.head, grad, collisions)
        values.append(value)
        if slope is not None:
            slopes.append(slope)
        squares.append(square)
    axis = 0 if alone else 1
    return Tiled(
        plan.joined(values, axis),
        plan.joined(slopes, axis) if grad else None,
        plan.joined(squares, 0) if collisions else None,
    )


class _Plan(NamedTuple):
    """How the rows are cut here: few of them with all logits, or more, a tile of logits each."""

    head: LinearHead  # what is widened once for all chunks is
    way: ModuleType | None  # a GPU's, that takes a chunk; None: tiles are folded
    rows: int
    chunks: list[slice]
    filler: int  # rows at the end that nobody asked for: chunks of few sizes use buffers again

    @classmethod
    def of(cls, head: LinearHead, rows: int) -> _Plan:
        """Of a half-precision matrix only a tile is widened at once."""
        here = device.here()
        way = None if here.fold else wide_tiles if head.half else whole_rows
        step, filler = here.vocab_rows, -rows % here.bucket
        if way is whole_rows:
            step = here.row_elements // head.vocab_size
            step = max(1, step - step % here.bucket)
        chunks = [slice(start, start + step) for start in range(0, rows + filler, step)]
        return cls(head if head.half else head.widened(), way, rows, chunks, filler)

    def filled(self, array: mx.array) -> mx.array:
        if not self.filler:
            return array
        return mx.pad(array, [(0, self.filler)] + [(0, 0)] * (array.ndim - 1))

    def one_chunk(self, alone: bool) -> Callable[..., tuple[mx.array, mx.array | None, mx.array]]:
        """alone: without a reference."""
        if self.way is None:
            return _chunk if alone else _chunk_with_kl
        return self.way.chunk if alone else self.way.chunk_with_kl

    def joined(self, parts: list[mx.array], axis: int) -> mx.array:
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
        if not self.filler:
            return whole
        return whole[: self.rows] if axis == 0 else whole[:, : self.rows]


def _chunk(
    rows: mx.array, targets: mx.array, head: LinearHead, grad: bool, collisions: bool
) -> tuple[mx.array, mx.array | None, mx.array]:
    sums = _Sums.start(rows.shape[0])
    picked = mx.zeros((rows.shape[0],))
    square = mx.zeros((rows.shape[0],))  # of exp(logits - top), summed; 0 unless asked for
    columns = device.here().vocab_columns
    for start in range(0, head.vocab_size, columns):
        tile = head.tile(slice(start, start + columns)).widened()
        done = [*sums, picked, square] if collisions else [*sums, picked]
        after = mx.depends(rows, done) if start else rows  # one after the other
        logits = tile(after)  # [r, tile]
        before = sums.top
        sums, parts = sums.add_and_parts(
            logits, lambda parts, t=tile, x=logits: t.back(parts, x) if grad else None
        )
        if collisions:
            square = _add_squares(square, parts, before, sums.top)
        picked = _pick(picked, logits, targets - start)
    values = picked - sums.log()
    slopes = head.slope_of(targets, picked) - sums.mean() if grad else None
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
) -> tuple[mx.array, mx.array | None, mx.array]:
    """KL = E_ref[ref logit - policy logit] - log-sum(ref) + log-sum(policy)."""
    n = rows.shape[0]
    policy, ref, picked = _Sums.start(n), _Sums.start(n), mx.zeros((n,))
    cross = mx.zeros((n,))  # of exp(ref logits - ref top) times (ref - policy logits)
    square = mx.zeros((n,))
    columns = device.here().vocab_columns
    for start in range(0, head.vocab_size, columns):
        tile = head.tile(slice(start, start + columns)).widened()
        done = [*policy, *ref, picked, cross, *([square] if collisions else [])]
        after = mx.depends(rows, done) if start else rows
        logits = tile(after)  # [r, tile]
        ref_logits = tile(mx.depends(ref_rows, [after]))

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
        return values, None, log_collisions
    mean = policy.mean()
    slopes = mx.stack([head.slope_of(targets, picked) - mean, mean - ref.mean()])
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
        """With a tile [r, tile] more, and the tile's exp(logits - top)."""
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
