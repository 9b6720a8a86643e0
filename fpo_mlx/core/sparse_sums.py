"""A sparse matrix, transposed, times a dense one: a gradient from the k entries of each row.

For a CPU. A dense product takes 2 n F D operations, all but k / F of them with zero. Here the
entries are sorted by feature, and each feature adds up its own rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from fpo_mlx.machine import lanes

ENTRIES = 1024  # gathered at a time: their rows stay in the cache of a core


@dataclass(frozen=True)
class ByFeature:
    """The entries of an index [n, k] in the order of their features."""

    order: mx.array  # int [n k], places in the flat index
    edges: mx.array  # int [F + 1], where each feature's entries begin and end
    cuts: list[tuple[int, int]]  # features of each piece of about ENTRIES entries


def by_feature(index: mx.array, n_features: int) -> ByFeature:
    """Evaluates the index: the pieces depend on it."""
    flat = index.flatten()
    counts = mx.zeros((n_features,), dtype=mx.int32).at[flat].add(mx.array(1, dtype=mx.int32))
    edges = mx.concatenate([mx.zeros((1,), dtype=mx.int32), mx.cumsum(counts)])
    order = _order(flat, n_features)
    mx.eval(order, edges)
    known: list[int] = edges.tolist()  # type: ignore[assignment]
    cuts, start = [], 0
    while start < n_features:
        stop = bisect.bisect_right(known, known[start] + ENTRIES, start + 1) - 1
        stop = min(max(stop, start + 1), n_features)
        cuts.append((start, stop))
        start = stop
    return ByFeature(order, edges, cuts)


def _order(flat: mx.array, n_features: int) -> mx.array:
    """argsort, by sorting feature and place as one number: no comparison looks up another array."""
    size = 1 << max(flat.size - 1, 1).bit_length()
    kind = mx.uint32 if n_features * size <= 1 << 32 else mx.uint64
    packed = flat.astype(kind) * size + mx.arange(flat.size, dtype=kind)
    return (mx.sort(packed) % size).astype(mx.int32)


def sums(entries: ByFeature, pairs: Sequence[tuple[mx.array, mx.array]], k: int) -> list[mx.array]:
    """out[f] = sum of values[i, j] * rows[i] over the entries (i, j) of feature f.

    pairs: (values [n, k], rows [n, D]), each on a lane of its own. Returns: [F, D] each.
    """
    found = []
    for number, (values, rows) in enumerate(pairs):
        with lanes.lane(number):
            found.append(_sum(entries, values, rows, k))
    return found


def _sum(entries: ByFeature, values: mx.array, rows: mx.array, k: int) -> mx.array:
    sorted_values, places = values.flatten()[entries.order][None], entries.order // k
    segments = mx.stack([entries.edges[:-1], entries.edges[1:]], axis=1)  # [F, 2]
    bounds: list[int] = entries.edges.tolist()  # type: ignore[assignment]
    pieces: list[mx.array] = []
    for first, last in entries.cuts:
        start, stop = bounds[first], bounds[last]
        own = (segments[first:last] - start).astype(mx.uint32)
        chosen = mx.depends(places[start:stop], pieces[-1]) if pieces else places[start:stop]
        if start == stop:
            pieces.append(mx.zeros((last - first, rows.shape[1])))
            continue
        pieces.append(mx.segmented_mm(sorted_values[:, start:stop], rows[chosen], own)[:, 0])
    return mx.concatenate(pieces)
