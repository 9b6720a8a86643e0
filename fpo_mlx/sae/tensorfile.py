"""One file of named tensors, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError


@dataclass(frozen=True)
class TensorFile:
    """One weight file. `read(name)` gives the tensor as float32, finite, C-contiguous or a view."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    fetch: Callable[[str], np.ndarray]  # any dtype that widens to float32
    extras: Mapping[str, Any] = field(default_factory=dict)  # numbers and strings beside tensors

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def rank(self, name: str) -> int:
        """Number of dimensions."""
        self._require(name)
        return len(self.shapes[name])

    def _require(self, name: str) -> None:
        if name not in self.shapes:
            raise SaeError(
                f"{self.path}: has no tensor {name!r}; it holds {', '.join(sorted(self.shapes))}. "
                "The file is another format than the one it was read as, or incomplete."
            )

    def read(self, name: str) -> np.ndarray:
        self._require(name)
        array = np.asarray(self.fetch(name)).astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise SaeError(
                f"{self.path}: tensor {name!r} has {bad} of {array.size} values that are NaN or "
                "infinite; wanted finite weights. Download or convert the file again."
            )
        return array

    def get(self, name: str) -> np.ndarray | None:
        return self.read(name) if name in self.shapes else None

    def first(self, *names: str) -> np.ndarray:
        """The tensor under the first of `names` that the file has."""
        present = [name for name in names if name in self.shapes]
        return self.read(present[0] if present else names[0])

    def scalar(self, name: str) -> float:
        array = self.read(name)
        if array.size != 1:
            raise SaeError(
                f"{self.path}: {name!r} has shape {list(array.shape)}; wanted one number."
            )
        return float(array.reshape(()))


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32 of the same shape, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
