"""Log-probabilities through a matrix in half precision, of which one wide tile is widened at once.

Logits in float32 want a float32 matrix, and widening the whole of it would double a model. So
`core.whole_rows` does not fit; but where every operation is a launch, the folding of
`core.vocabulary` is too many. Here each tile gives its own log-sum-exp, and its own softmax's pull
on the rows; what they weigh in the whole is known at the end, and applied to all tiles at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from fpo_mlx.core.linear_head import LinearHead
from fpo_mlx.machine import device


class _Tile(NamedTuple):
    """What is kept of a tile of the vocabulary; all float32."""

    log: mx.array  # [r], log-sum-exp of its logits
    pull: mx.array | None  # [r, D], its softmax's mean of the matrix's rows
    square: mx.array | None  # [r], log-sum-exp of twice its logits

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self if array is not None]


def chunk(
    rows: mx.array, targets: mx.array, head: LinearHead, grad: bool, collisions: bool
) -> tuple[mx.array, mx.array | None, mx.array]:
    """rows: float32 [r, D], targets: [r] -> log-probs [r], slopes [r, D], log collisions [r]."""
    tiles: list[_Tile] = []
    for tile in _tiles(head):
        logits = tile(mx.depends(rows, tiles[-1].arrays) if tiles else rows)
        tiles.append(_tile(tile, logits, grad, collisions))
    logs, log = _joined(tiles)
    picked, slope = _picked(rows, targets, head, grad)
    values = picked - log
    squares = _collisions(tiles, log) if collisions else values
    if slope is None:
        return values, None, squares
    return values, slope - _mean(tiles, logs, log), squares


def chunk_with_kl(
    rows: mx.array,
    ref_rows: mx.array,
    targets: mx.array,
    head: LinearHead,
    grad: bool,
    collisions: bool,
) -> tuple[mx.array, mx.array | None, mx.array]:
    """The same with KL(reference || policy): values [2, r], slopes [2, r, D].

    KL = E_ref[ref logit - policy logit] - log-sum(ref) + log-sum(policy).
    """
    tiles, ref_tiles, crosses = [], [], []
    for tile in _tiles(head):
        done = [*tiles[-1].arrays, *ref_tiles[-1].arrays, crosses[-1]] if tiles else []
        logits = tile(mx.depends(rows, done) if done else rows)
        ref_logits = tile(mx.depends(ref_rows, [logits]))
        tiles.append(_tile(tile, logits, grad, collisions))
        log = mx.logsumexp(ref_logits, axis=-1)
        parts = _softmax(ref_logits, log[:, None])
        # both pull on the policy's rows, through the policy's cap
        pull = tile.back(parts, logits) if grad else None
        ref_tiles.append(_Tile(log, pull, None))
        crosses.append(_times_gap(parts, ref_logits, logits).sum(axis=-1))
    (logs, log), (ref_logs, ref_log) = _joined(tiles), _joined(ref_tiles)
    picked, slope = _picked(rows, targets, head, grad)
    cross = _weighted(mx.stack(crosses, axis=-1), ref_logs, ref_log[:, None]).sum(axis=-1)
    values = mx.stack([picked - log, cross - ref_log + log])
    squares = _collisions(tiles, log) if collisions else values[0]
    if slope is None:
        return values, None, squares
    mean = _mean(tiles, logs, log)
    slopes = mx.stack([slope - mean, mean - _mean(ref_tiles, ref_logs, ref_log)])
    return values, slopes, squares


def _tiles(head: LinearHead) -> Sequence[LinearHead]:
    """Of equal width, each widened by itself."""
    width, vocab = head.weight.shape[1], head.vocab_size
    count = -(-vocab * width // device.here().wide_elements)
    columns = -(-vocab // min(max(count, 1), vocab))
    return [head.tile(slice(at, at + columns)).widened() for at in range(0, vocab, columns)]


def _tile(tile: LinearHead, logits: mx.array, grad: bool, collisions: bool) -> _Tile:
    log = mx.logsumexp(logits, axis=-1)
    pull = tile.back(_softmax(logits, log[:, None]), logits) if grad else None
    return _Tile(log, pull, mx.logsumexp(2.0 * logits, axis=-1) if collisions else None)


def _joined(tiles: Sequence[_Tile]) -> tuple[mx.array, mx.array]:
    """Log-sum-exps of the tiles [r, n], of the whole [r]; one kernel, as it is the last axis."""
    logs = mx.stack([tile.log for tile in tiles], axis=-1)
    return logs, mx.logsumexp(logs, axis=-1)


def _mean(tiles: Sequence[_Tile], logs: mx.array, log: mx.array) -> mx.array:
    """[r, D], the rows of the matrix in expectation."""
    pulls = mx.stack([tile.pull for tile in tiles if tile.pull is not None])
    return _weighted(pulls, logs.T[:, :, None], log[:, None]).sum(axis=0)


def _collisions(tiles: Sequence[_Tile], log: mx.array) -> mx.array:
    """log sum_v pi(v)^2, [r]."""
    squares = [tile.square for tile in tiles if tile.square is not None]
    return mx.logsumexp(mx.stack(squares, axis=-1), axis=-1) - 2.0 * log


def _picked(
    rows: mx.array, targets: mx.array, head: LinearHead, grad: bool
) -> tuple[mx.array, mx.array | None]:
    """Each target's logit [r], and its slope by the rows [r, D]."""
    weight = mx.take(head.weight, targets, axis=0).astype(mx.float32)
    own = (rows[:, None] @ weight[:, :, None]).reshape(-1)
    if head.bias is not None:
        own = own + mx.take(head.bias, targets)
    logits = head.finished(own)
    return logits, head.slope_of(targets, logits) if grad else None


@partial(mx.compile, shapeless=True)
def _softmax(logits, log):
    return mx.exp(logits - log)


@partial(mx.compile, shapeless=True)
def _times_gap(parts, ref_logits, logits):
    """Zero to the bit where the logits are the same: all differences are."""
    return parts * (ref_logits - logits)


@partial(mx.compile, shapeless=True)
def _weighted(values, logs, log):
    return values * mx.exp(logs - log)
