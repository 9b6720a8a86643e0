"""The order in which pairs are trained on: reproducible, and startable at any place.

A batch is what one update sees. Micro-batches are slices of it, so they cost memory or time and
change nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from fpo_mlx.records import TokenPair

# Pairs are sorted by length within pools of this many batches: little padding, and yet other
# company for a pair in every epoch.
POOL = 32


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, twins: np.ndarray | None = None
) -> list[np.ndarray]:
    """The batches of one epoch, as indices into `lengths`.

    lengths: [N], tokens of each pair. twins: of `mirrored`; such two stand next to each other, in
    one batch where batch_size is even and all have a twin. Returns ceil(N / batch_size) int64
    arrays of at most batch_size indices, ascending by length (of the first of two): every pair
    once, pairs of similar length together, the batches in random order (one may be short). Equal
    arguments give equal batches, on any machine and with any numpy.
    """
    lengths = np.asarray(lengths)
    sizes = np.ones(len(lengths), int) if twins is None else _sizes(twins)
    dealt = np.flatnonzero(sizes)  # a pair, or the first of two
    dealt = dealt[_shuffled(len(dealt), seed, epoch, 0)]
    pools = (np.cumsum(sizes[dealt]) - sizes[dealt]) // (POOL * batch_size)
    dealt = dealt[np.lexsort((lengths[dealt], pools))]
    order = np.array([i for at in dealt for i in range(at, at + sizes[at])], int)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return [batches[at] for at in _shuffled(len(batches), seed, epoch, 1)]


def _sizes(twins: np.ndarray) -> np.ndarray:
    """How many pairs are dealt with each: [N] of 1, of 2 and then 0 for two that go together."""
    sizes = np.ones(len(twins), int)
    sizes[twins] = 2
    sizes[1:][twins[:-1]] = 0
    return sizes


def mirrored(pairs: Sequence[TokenPair]) -> np.ndarray | None:
    """[N] bool: a pair that the next one turns round for another prompt; None where none is.

    Such rows come of `pairs build --reward-augmented`: one answer is better for one wanted score,
    the other for the other. In one update what both say of the answers themselves cancels, and what
    is left is what the prompts differ in. Answers that were cut to different lengths are no twins.
    """
    twins = np.zeros(len(pairs), bool)
    for i in range(1, len(pairs)):
        one, two = pairs[i - 1], pairs[i]
        twins[i - 1] = (
            not (i > 1 and twins[i - 2])
            and np.array_equal(one.chosen, two.rejected)
            and np.array_equal(one.rejected, two.chosen)
            and not np.array_equal(one.prompt, two.prompt)
        )
    return twins if twins.any() else None


def batches(
    lengths: np.ndarray, batch_size: int, seed: int, start: int = 0,
    twins: np.ndarray | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Batches without end, as `epoch_batches` makes them.

    start: how many, counted over all epochs, are left out, so a run that has done n updates goes on
    with start=n. twins: of `mirrored`.
    """
    each = batches_per_epoch(len(lengths), batch_size)
    if each == 0:
        raise ValueError("no pairs to make batches of")
    epoch, skip = divmod(start, each)
    while True:
        yield from epoch_batches(lengths, batch_size, seed, epoch, twins)[skip:]
        epoch, skip = epoch + 1, 0


def visited(
    lengths: np.ndarray, batch_size: int, seed: int, count: int, twins: np.ndarray | None = None
) -> np.ndarray:
    """The indices, ascending, of all pairs that stand in the first `count` of `batches`."""
    if count >= batches_per_epoch(len(lengths), batch_size):
        return np.arange(len(lengths))
    some = list(islice(batches(lengths, batch_size, seed, 0, twins), count))
    return np.sort(np.concatenate(some)) if some else np.zeros(0, np.int64)


def batches_per_epoch(n_pairs: int, batch_size: int) -> int:
    return -(-n_pairs // batch_size)


def micro_batches(batch: np.ndarray, size: int) -> list[np.ndarray]:
    """A batch cut into consecutive pieces of at most `size` indices."""
    return [batch[at : at + size] for at in range(0, len(batch), size)]


def _shuffled(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """A permutation of range(n): int64 [n].

    Ranks raw bits of the generator: numpy promises those never to change, and makes no such
    promise for its permutations.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(n)
    return np.argsort(bits, kind="stable")
