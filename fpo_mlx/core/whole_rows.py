"""Log-probabilities of a chunk of rows over the whole vocabulary at once: a GPU's way.

Where every operation is a launch, a few large ones are wanted. The kernel `mx.fast.cross_entropy`
reads the logits once for the value, and its VJP once more for the slope; two products with the
matrix are the rest. `core.vocabulary` cuts the rows, and folds tiles instead on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import mlx.core as mx

from fpo_mlx.core.linear_head import LinearHead


def chunk(
    rows: mx.array, targets: mx.array, head: LinearHead, grad: bool, collisions: bool
) -> tuple[mx.array, mx.array | None, mx.array]:
    """rows: float32 [r, D], targets: [r] -> log-probs [r], slopes [r, D], log collisions [r]."""
    logits = head(rows)
    values, slopes = _values_and_slopes(logits, targets, head, grad)
    return values, slopes, _log_collisions(logits) if collisions else values


def chunk_with_kl(
    rows: mx.array,
    ref_rows: mx.array,
    targets: mx.array,
    head: LinearHead,
    grad: bool,
    collisions: bool,
) -> tuple[mx.array, mx.array | None, mx.array]:
    """The same with KL(reference || policy): values [2, r], slopes [2, r, D]."""
    logits = head(rows)
    ref_logits = head(mx.depends(ref_rows, [logits]))
    values, slopes = _values_and_slopes(logits, targets, head, grad)
    log, ref_log = (mx.logsumexp(x, axis=-1, keepdims=True) for x in (logits, ref_logits))
    kl = (_cross(logits, ref_logits, ref_log)).sum(axis=-1) + (log - ref_log).squeeze(-1)
    squares = _log_collisions(logits) if collisions else values
    if slopes is None:
        return mx.stack([values, kl]), None, squares
    pull = head.back(_gap(logits, log, ref_logits, ref_log), logits)
    return mx.stack([values, kl]), mx.stack([slopes, pull]), squares


def _values_and_slopes(
    logits: mx.array, targets: mx.array, head: LinearHead, grad: bool
) -> tuple[mx.array, mx.array | None]:
    def value(logits: mx.array) -> mx.array:
        return -mx.fast.cross_entropy(logits, targets)

    if not grad:
        return value(logits), None
    ones = mx.ones(targets.shape, dtype=mx.float32)
    (values,), (pulls,) = mx.vjp(value, [logits], [ones])
    return cast(mx.array, values), head.back(pulls, logits)


def _log_collisions(logits: mx.array) -> mx.array:
    """log sum_v pi(v)^2. [r, V] -> [r]."""
    return mx.logsumexp(2.0 * logits, axis=-1) - 2.0 * mx.logsumexp(logits, axis=-1)


@partial(mx.compile, shapeless=True)
def _cross(logits, ref_logits, ref_log):
    """pi_ref times the difference of logits; summed over the vocabulary it is the KL's first part.

    The whole is zero to the bit where the logits are the same: all differences are.
    """
    return mx.exp(ref_logits - ref_log) * (ref_logits - logits)


@partial(mx.compile, shapeless=True)
def _gap(logits, log, ref_logits, ref_log):
    """d KL / d logits: pi - pi_ref."""
    return mx.exp(logits - log) - mx.exp(ref_logits - ref_log)
