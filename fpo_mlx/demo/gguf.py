"""A reader of the GGUF files that llama.cpp writes: metadata and tensors, in numpy alone.

Knows the four tensor types that SmolLM2's file can hold: float32, float16, Q4_1 and Q8_0.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpo_mlx.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_BLOCK = 32  # values that share one scale in Q4_1 and Q8_0
_Q4_1 = np.dtype([("scale", "<f2"), ("low", "<f2"), ("nibbles", "u1", (_BLOCK // 2,))])
_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", (_BLOCK,))])
_TYPES = {0: ("F32", np.dtype("<f4"), 1), 1: ("F16", np.dtype("<f2"), 1)}
_TYPES |= {3: ("Q4_1", _Q4_1, _BLOCK), 8: ("Q8_0", _Q8_0, _BLOCK)}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major (GGUF itself lists the fastest axis first)."""

    shape: tuple[int, ...]
    kind: int  # ggml's type number
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class GgufFile:
    """An opened file: its bytes, its metadata, and where its tensors are."""

    data: bytes
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise struct.error(f"a text of {length} bytes runs past the end")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def parse(data: bytes, source: str = "GGUF data") -> GgufFile:
    """Reads the header of a whole GGUF file, version 2 or 3. Raises ModelError on other data."""
    if data[:4] != b"GGUF":
        raise ModelError(f"{source} begins with {data[:4]!r}; a GGUF file begins with b'GGUF'.")
    cursor = _Cursor(data)
    cursor.at = 4
    try:
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{source} is GGUF version {version}; versions 2 and 3 are read.")
        n_tensors, n_metadata = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(n_metadata):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.scalar("I"))
        found = [_tensor_info(cursor) for _ in range(n_tensors)]
    except (struct.error, UnicodeDecodeError) as e:
        raise ModelError(f"{source} is damaged at byte {cursor.at}: {e}. Fetch it again.") from e
    align = metadata.get("general.alignment", 32)
    start = -(-cursor.at // align) * align
    tensors = {name: TensorInfo(shape, kind, start + at) for name, shape, kind, at in found}
    return GgufFile(data, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    fastest_first = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
    return name, tuple(reversed(fastest_first)), cursor.scalar("I"), cursor.scalar("Q")


def tensor(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as float32, row-major. Raises ModelError if it is absent, cut off or unknown."""
    if name not in file.tensors:
        raise ModelError(f"The GGUF file has no tensor {name!r}: is it a Llama model?")
    info = file.tensors[name]
    if info.kind not in _TYPES:
        known = ", ".join(label for label, _, _ in _TYPES.values())
        raise ModelError(f"Tensor {name!r} has ggml type {info.kind}; only {known} are read.")
    _, dtype, block = _TYPES[info.kind]
    count = int(np.prod(info.shape)) // block
    if info.offset + count * dtype.itemsize > len(file.data):
        raise ModelError(f"The GGUF file ends inside tensor {name!r}. Fetch it again.")
    raw = np.frombuffer(file.data, dtype, count, info.offset)
    return _decode(raw, info.kind).reshape(info.shape)


def _decode(raw: np.ndarray, kind: int) -> np.ndarray:
    """Blocks to float32, one row per block."""
    if kind == 3:  # the low nibbles are values 0..15 of a block, the high ones 16..31
        nibbles = np.concatenate([raw["nibbles"] & 15, raw["nibbles"] >> 4], axis=1)  # [n, 32]
        scale, low = (raw[key].astype(np.float32)[:, None] for key in ("scale", "low"))
        return nibbles * scale + low
    if kind == 8:
        return raw["values"] * raw["scale"].astype(np.float32)[:, None]
    return raw.astype(np.float32)
