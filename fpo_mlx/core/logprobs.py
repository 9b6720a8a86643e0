"""Log-probabilities of response tokens from hidden rows, a few logits at a time.

The rows' logits [R, V] never exist together. A head that is one matrix goes through the tiles of
`core.vocabulary`; any other is applied to chunks of rows whose element count is fixed. Rows are
independent, so the gradient of each row's value is one row of [R, D]; it is taken in the same pass
as the value, while the logits are at hand. That costs two head products where recomputation in the
backward pass (checkpointing) costs three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import mlx.core as mx

from fpo_mlx.core.linear_head import LinearHead
from fpo_mlx.core.vocabulary import tiled

Head = Callable[[mx.array], mx.array]  # [r, D] -> [r, V], final soft-caps and scales included

CHUNK_ELEMENTS = 1 << 23  # logits alive at once: 32 MiB in float32
INNER_SUM = 2048  # terms of a sum in float32


def logsumexp(logits: mx.array) -> mx.array:
    """Float32 log-sum-exp over the last axis. [r, V] -> [r].

    In two levels: MLX's CPU kernel adds the V terms one after the other in float32, which loses
    5e-5 nats a token at V = 49152; two shorter sums lose a tenth of that or less.
    """
    return cast(mx.array, _logsumexp(logits))


def _two_level_sum(logits: mx.array) -> mx.array:
    vocab = logits.shape[-1]
    inner = next(d for d in range(min(vocab, INNER_SUM), 0, -1) if vocab % d == 0)
    inner = inner if inner > 1 else vocab  # a prime above INNER_SUM
    parts = logits.astype(mx.float32).reshape(-1, vocab // inner, inner)
    return mx.logsumexp(mx.logsumexp(parts, axis=-1), axis=-1)


_logsumexp = mx.custom_function(_two_level_sum)


@_logsumexp.vjp
def _softmax(logits: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """From the value that is at hand: one pass over [r, V]."""
    softmax = mx.exp(logits.astype(mx.float32) - output[:, None])
    return (cotangent[:, None] * softmax).astype(logits.dtype)


def log_softmax(logits: mx.array) -> mx.array:
    """Float32 log-softmax over the last axis, whatever the dtype of `logits`. [r, V] -> [r, V]."""
    return logits.astype(mx.float32) - logsumexp(logits)[:, None]


def pick(values: mx.array, targets: mx.array) -> mx.array:
    """values: [r, V], targets: [r] -> [r], the entry of each row's target."""
    return mx.take_along_axis(values, targets[:, None], axis=-1).squeeze(-1)


def row_chunks(n_rows: int, width: int, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Slices that cut n_rows into pieces of at most `elements` values of `width` columns each."""
    step = max(1, elements // width)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


class TokenValues(NamedTuple):
    """What is known of each row's next token; all [R] float32."""

    logps: mx.array  # of the token that follows, nats
    kl: mx.array | None = None  # KL(reference || policy) of the distribution
    log_collisions: mx.array | None = None  # log sum_v pi(v)^2 of the policy, a constant


def token_values(
    hidden: mx.array,
    targets: mx.array,
    head: Head,
    vocab_size: int,
    *,
    ref_hidden: mx.array | None = None,
    collisions: bool = False,
    grad: bool = True,
) -> TokenValues:
    """Log-probs, with `ref_hidden` the KL too, with `collisions` what WPO's weights are made of.

    hidden, ref_hidden: [R, D] after the final norm, targets: [R] int. `grad=False` skips the
    gradient.
    """
    if isinstance(head, LinearHead):
        return _through_tiles(hidden, ref_hidden, targets, head, collisions, grad)
    kl = None
    if ref_hidden is None:
        logps = token_logps(hidden, targets, head, vocab_size, grad=grad)
    else:
        logps, kl = _logps_and_kl(hidden, ref_hidden, targets, head, vocab_size, grad)
    if not collisions:
        return TokenValues(logps, kl)

    def of_squares(rows: mx.array) -> mx.array:
        return logsumexp(2.0 * log_softmax(head(rows)))

    found = _by_rows([of_squares], mx.stop_gradient(hidden), [], vocab_size, False)
    return TokenValues(logps, kl, found[0])


def _through_tiles(
    hidden: mx.array,
    ref_hidden: mx.array | None,
    targets: mx.array,
    head: LinearHead,
    collisions: bool,
    grad: bool,
) -> TokenValues:
    frozen = mx.stop_gradient(hidden)
    fixed = None if ref_hidden is None else mx.stop_gradient(ref_hidden)
    done = tiled(frozen, targets, head, ref_rows=fixed, grad=grad, collisions=collisions)
    both = fixed is not None
    values = list(done.values) if both else [done.values]
    if done.slopes is not None:
        slopes = list(done.slopes) if both else [done.slopes]
        values = [_with_slope(v, s, hidden, frozen) for v, s in zip(values, slopes, strict=True)]
    return TokenValues(values[0], values[1] if both else None, done.log_collisions)


def token_logps(
    hidden: mx.array, targets: mx.array, head: Head, vocab_size: int, *, grad: bool = True
) -> mx.array:
    """Log-prob of the token that follows each row, in nats.

    hidden: [R, D] after the final norm, targets: [R] int. `grad=False` skips the gradient.
    Returns: [R] float32.
    """
    if isinstance(head, LinearHead):
        return _through_tiles(hidden, None, targets, head, False, grad).logps

    def value(rows: mx.array, goals: mx.array) -> mx.array:
        logits = head(rows).astype(mx.float32)
        return pick(logits, goals) - logsumexp(logits)

    return _by_rows([value], hidden, [targets], vocab_size, grad)[0]


def _logps_and_kl(
    hidden: mx.array, ref_hidden: mx.array, targets: mx.array, head: Head, vocab_size: int,
    grad: bool,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """`token_logps`, and KL(reference || policy) of the next-token distribution at each row.

    head: any function. hidden, ref_hidden: [R, D]; no gradient flows to the reference. Returns: two
    [R] float32.
    Source: TDPO (Zeng et al. 2024, arXiv 2404.11999), Eq. 15: sequential KL is the row sum.
    """

    def logps(rows: mx.array, ref_rows: mx.array, goals: mx.array) -> mx.array:
        del ref_rows
        return pick(log_softmax(head(rows)), goals)

    def kl(rows: mx.array, ref_rows: mx.array, goals: mx.array) -> mx.array:
        del goals
        ref = log_softmax(head(ref_rows))  # [r, V]
        gap = ref - log_softmax(head(rows))
        gap = mx.where(ref > -mx.inf, gap, 0.0)  # 0 (-inf - -inf) is no number
        return (mx.exp(ref) * gap).sum(axis=-1)

    extra = [mx.stop_gradient(ref_hidden), targets]
    logps_rows, kl_rows = _by_rows([logps, kl], hidden, extra, vocab_size, grad)
    return logps_rows, kl_rows


def _by_rows(
    functions: Sequence[Callable[..., mx.array]],
    hidden: mx.array,
    extra: Sequence[mx.array],
    width: int,
    grad: bool,
) -> list[mx.array]:
    """Each function of (rows, *extra rows) -> [r], over chunks; differentiable in `hidden`."""
    frozen = mx.stop_gradient(hidden)
    values: list[list[mx.array]] = [[] for _ in functions]
    slopes: list[list[mx.array]] = [[] for _ in functions]
    done: list[mx.array] = []  # of the chunk before: the next one waits for it
    for rows in row_chunks(hidden.shape[0], width):
        first = mx.depends(frozen[rows], done) if done else frozen[rows]
        parts, done = [first, *(array[rows] for array in extra)], []
        for i, function in enumerate(functions):
            if not grad:
                values[i].append(function(*parts))
                done.append(values[i][-1])
                continue
            value, slope = _value_and_slope(function, parts)
            values[i].append(value)
            slopes[i].append(slope)
            done.append(slope)
    joined = [mx.concatenate(pieces) for pieces in values]
    if not grad:
        return joined
    return [
        _with_slope(v, mx.concatenate(s), hidden, frozen)
        for v, s in zip(joined, slopes, strict=True)
    ]


def _with_slope(values: mx.array, slopes: mx.array, hidden: mx.array, frozen: mx.array) -> mx.array:
    """Constants `values` [R] given the gradient `slopes` [R, D] in `hidden` [R, D].

    What is added is zero, but d/dh [v + (h - sg(h)) . slope] = slope.
    """
    return values + ((hidden - frozen).astype(mx.float32) * slopes).sum(axis=-1)


def _value_and_slope(
    function: Callable[..., mx.array], parts: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """Value [r] and its gradient [r, D] in the first part; row i's value depends on row i alone."""
    first, rest = parts[0], parts[1:]
    ones = mx.ones(first.shape[0], dtype=mx.float32)
    (value,), (slope,) = mx.vjp(lambda rows: function(rows, *rest), [first], [ones])
    return value, slope.astype(mx.float32)
