"""One file of named tensors, whatever its format."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.sae.stored import Stored, all_finite

READ_AT_ONCE = 1 << 16  # bytes


@dataclass(frozen=True)
class TensorFile:
    """One weight file. `read(name)` gives the tensor as float32, finite, C-contiguous or a view."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    fetch: Callable[[str], np.ndarray]  # any dtype that widens to float32
    extras: Mapping[str, Any] = field(default_factory=dict)  # numbers and strings beside tensors
    # the tensor as it lies in the file, bfloat16 as its 16 bits; None: it cannot be mapped
    mapped: Callable[[str], np.ndarray | None] = lambda _: None

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

    def stored(self, name: str) -> np.ndarray:
        """A matrix that stays in the file (`stored.Stored`), read once to see that it is finite.

        What cannot be mapped, such as a compressed one, is read.
        """
        self._require(name)
        raw = self.mapped(name)
        if raw is None or raw.ndim != 2:
            return self.read(name)
        found = Stored.of(raw, _widened)
        return found if all_finite(found) else self.read(name)  # which says what is wrong

    def get(self, name: str) -> np.ndarray | None:
        return self.read(name) if name in self.shapes else None

    def first(self, *names: str, stay: bool = False) -> np.ndarray:
        """The tensor under the first of `names` that the file has. stay: as `stored` gives it."""
        present = [name for name in names if name in self.shapes]
        read = self.stored if stay else self.read
        return read(present[0] if present else names[0])

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


def _widened(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return widen_bfloat16(values)
    return values.astype(np.float32, copy=False)


def place_in_zip(path: Path, archive: zipfile.ZipFile, name: str) -> int | None:
    """Offset in the file of an entry's bytes, once they have the sum that the archive states.

    None: the entry is compressed, or the archive's sizes of it disagree. Raises what zipfile does
    for a damaged one.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        return None
    with archive.open(entry) as stream:
        while stream.read(READ_AT_ONCE):
            pass
    with open(path, "rb") as file:  # the local header's extra field is not the directory's
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
    name_length, extra = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
    return entry.header_offset + 30 + name_length + extra
