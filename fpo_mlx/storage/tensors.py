"""The header of a safetensors file, and pieces of many files with few of them open."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from fpo_mlx.storage.files import parse_json

MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
OPEN_FILES = 16


class Tensor(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str  # safetensors' name: "F32", "BF16", …
    shape: tuple[int, ...]
    start: int  # offset in the file, bytes
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    end: int  # offset of the first byte behind the header


def read_header(path: Path) -> Header:
    """Read a file's header; whether its tensors lie within the file is the caller's to check.

    Raises: ValueError for anything but the header of a safetensors file, OSError.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise ValueError(f"its header claims {length} bytes")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    end = 8 + length
    return Header({name: _tensor(name, one, end) for name, one in header.items()}, metadata, end)


def _tensor(name: str, entry: object, end: int) -> Tensor:
    name.encode()  # half a surrogate pair is a ValueError here, not where the name is used
    try:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        numbers = (*shape, begin, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is described by {json.dumps(entry)[:80]}") from error
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or begin > stop:
        raise ValueError(f"extents of {name!r} that cannot be")
    if type(dtype) is not str:
        raise ValueError(f"{name!r} has a dtype that is no text")
    dtype.encode()
    return Tensor(dtype, tuple(shape), end + begin, stop - begin)


class OpenFiles:
    """Reads pieces of many files; the few that were read last stay open."""

    def __init__(self, most: int = OPEN_FILES) -> None:
        self._most = most
        self._open: OrderedDict[Path, IO[bytes]] = OrderedDict()

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Raises: OSError, ValueError when the file ends before the piece does."""
        file = self._open.pop(path, None) or open(path, "rb", buffering=0)  # noqa: SIM115 (kept)
        self._open[path] = file
        if len(self._open) > self._most:
            self._open.popitem(last=False)[1].close()
        file.seek(start)
        data = file.read(size)
        if len(data) != size:
            raise ValueError(f"it ends at byte {start + len(data)}, wanted {start + size}")
        return data

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        self.close()
