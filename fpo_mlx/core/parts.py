"""A matrix in several arrays, for devices whose one buffer does not hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx


@dataclass(frozen=True)
class Parts:
    """[F, D] by consecutive rows."""

    arrays: Sequence[mx.array]  # [f_i, D] each

    @property
    def shape(self) -> tuple[int, int]:
        return sum(array.shape[0] for array in self.arrays), self.arrays[0].shape[1]

    def slices(self) -> list[slice]:
        """The rows that each array holds."""
        ends = accumulate((array.shape[0] for array in self.arrays), initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def __getitem__(self, rows: slice) -> mx.array:
        """Consecutive rows; no copy where they lie in one array."""
        start, stop, _ = rows.indices(self.shape[0])
        found = [
            array[max(start - own.start, 0) : stop - own.start]
            for array, own in zip(self.arrays, self.slices(), strict=True)
            if start < own.stop and stop > own.start
        ]
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def take(self, indices: mx.array) -> mx.array:
        """The rows `indices` [K] -> [K, D]."""
        rows = mx.take(self.arrays[0], mx.minimum(indices, len(self.arrays[0]) - 1), axis=0)
        for array, own in zip(self.arrays[1:], self.slices()[1:], strict=True):
            here = mx.clip(indices - own.start, 0, own.stop - own.start - 1)
            found = mx.take(array, here, axis=0)
            rows = mx.where((indices >= own.start)[:, None], found, rows)
        return rows


def rows_at(array: mx.array | Parts, indices: mx.array) -> mx.array:
    """Those rows (those entries, of a vector). indices: [K] -> [K, ...]."""
    return array.take(indices) if isinstance(array, Parts) else mx.take(array, indices, axis=0)
