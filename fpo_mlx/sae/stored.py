"""A matrix that stays in its file and is read a block at a time: loading it takes no memory.

It stands where a numpy matrix would. What the readers of SAE files ask of one is its shape, blocks
of it, its transpose and products with factors; for anything else numpy reads the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

BLOCK = 1 << 22  # values at once: 16 MiB in float32
Read = Callable[[Any, slice], np.ndarray]  # (rows, columns) -> float32 [rows, columns]


@dataclass(frozen=True, eq=False)
class Stored:
    """[n, m] float32 to those who look at it, whatever the file holds."""

    shape: tuple[int, int]
    read: Read
    turned: bool = False  # a column lies in one piece in the file, not a row

    ndim = 2
    dtype = np.dtype(np.float32)

    @staticmethod
    def of(raw: np.ndarray, widen: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """raw: a mapped matrix of any dtype that `widen` turns into float32."""
        n, m = raw.shape
        turned = raw.strides[0] < raw.strides[1]
        made = Stored((n, m), lambda rows, columns: widen(raw[rows, columns]), turned)
        return cast(np.ndarray, made)  # which it is in all that is asked of it

    @property
    def T(self) -> Stored:  # noqa: N802 (numpy's name)
        return Stored(
            (self.shape[1], self.shape[0]), lambda a, b: self.read(b, a).T, not self.turned
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.read(*(key if isinstance(key, tuple) else (key, slice(None))))

    def __mul__(self, factor: Any) -> Stored:
        """factor: a number, [m] or [n, 1]."""
        factors = self._spread(factor)
        return replace(self, read=lambda a, b: self.read(a, b) * factors[a, b])

    def __truediv__(self, factor: Any) -> Stored:
        factors = self._spread(factor)
        return replace(self, read=lambda a, b: self.read(a, b) / factors[a, b])

    def _spread(self, factor: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(factor, np.float32), self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(slice(None), slice(None)), dtype=dtype or np.float32)


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """A matrix in blocks of `BLOCK` values or so, in the order in which they are stored."""
    turned = getattr(array, "turned", None)
    if turned is None:
        turned = array.strides[0] < array.strides[1]
    return by_rows(array.T if turned else array)


def by_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of whole rows, however they are stored."""
    step = max(8, BLOCK // max(array.shape[1], 1) // 8 * 8)
    for at in range(0, len(array), step):
        yield array[at : at + step]


def all_finite(array: np.ndarray) -> bool:
    """Of a vector, or of a matrix without a copy of it."""
    parts = pieces(array) if array.ndim == 2 else (array,)
    return all(np.isfinite(part).all() for part in parts)
