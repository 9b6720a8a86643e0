"""The order in which pairs are trained on: reproducible, and startable at any place.

A batch is what one update sees. Micro-batches are slices of it, so they cost memory or time and
change nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Pairs are sorted by length within pools of this many batches: little padding, and yet other
# company for a pair in every epoch.
POOL = 32


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, as indices into `lengths`.

    lengths: [N], tokens of each pair. Returns ceil(N / batch_size) int64 arrays of at most
    batch_size indices, ascending by length: every pair once, pairs of similar length together, the
    batches in random order (one may be short). Equal arguments give equal batches, on any machine
    and with any numpy.
    """
    lengths = np.asarray(lengths)
    order = _shuffled(len(lengths), seed, epoch, 0)  # [N]
    batches: list[np.ndarray] = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    return [batches[at] for at in _shuffled(len(batches), seed, epoch, 1)]


def batches(
    lengths: np.ndarray, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Batches without end: (epoch, position, indices).

    position counts batches from 0 over all epochs; `start` is the first position to yield, so a
    run that has done n updates goes on with start=n.
    """
    each = batches_per_epoch(len(lengths), batch_size)
    if each == 0:
        raise ValueError("no pairs to make batches of")
    epoch, skip = divmod(start, each)
    while True:
        for offset, indices in enumerate(epoch_batches(lengths, batch_size, seed, epoch)):
            if offset >= skip:
                yield epoch, epoch * each + offset, indices
        epoch, skip = epoch + 1, 0


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
