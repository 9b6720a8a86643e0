"""Tensors out of a torch .pt file without torch, and without running anything from it.

A torch file is a zip: `<name>/data.pkl` describes the tensors, `<name>/data/<key>` holds their
bytes. The unpickler below admits a handful of names; any other global is refused before it is
looked up, so a pickle that asks for `os.system` does nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.sae.tensorfile import TensorFile, place_in_zip, widen_bfloat16

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
    "UntypedStorage": "untyped",
}
_DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "bfloat16",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint8": "|u1",
    "bool": "|b1",
}
_MAX_PICKLE = 64 << 20  # bytes; a description of tensors, not their values
_WRAPPERS = ("ae", "sae", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's values lie; nothing is read yet. Offset and strides count elements."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorsOnly(pickle.Unpickler):
    """Admits torch's tensor-rebuilding names and OrderedDict, each by a harmless stand-in.

    The stand-ins are bound methods and strings, so a pickle cannot set attributes on them.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return self._tensor if name.endswith("2") else self._typed_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return self._parameter
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and name in ("Size", "device"):
            return self._as_tuple
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key = pid[:3]
        known = isinstance(dtype, str) and dtype in (*_DTYPES.values(), "untyped")
        if kind != "storage" or not known or not isinstance(key, str):
            raise pickle.UnpicklingError("it refers to something that is no tensor storage")
        return key, dtype

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        key, dtype = storage
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor has impossible extents")
        return _Tensor(key, dtype, offset, tuple(shape), tuple(strides))

    def _typed_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any):
        return self._tensor((storage[0], rest[2]), offset, shape, strides)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _as_tuple(self, *args: Any) -> tuple[Any, ...]:
        return args


def open_torch(path: Path) -> TensorFile:
    """A dict of tensors saved by torch.save (1.6 or later), on its own or one level down.

    Raises SaeError for other objects, for old or compressed files, and for any pickle that names
    more than tensors and plain containers.
    """
    root, archive = _description(path)
    if not isinstance(root, dict):
        raise SaeError(f"{path}: holds a {type(root).__name__}; wanted a dictionary of tensors.")
    outer = root
    for wrapper in _WRAPPERS:
        if isinstance(root.get(wrapper), dict) and _tensors(root[wrapper]):
            outer, root = {k: v for k, v in root.items() if k != wrapper}, root[wrapper]
            break
    tensors = _tensors(root)
    beside = {**outer, **root}
    extras = {str(k): v for k, v in beside.items() if not isinstance(v, _Tensor)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return TensorFile(
        path,
        shapes,
        lambda name: _values(path, archive, tensors[name]),
        extras,
        lambda name: _mapped(path, archive, tensors[name]),
    )


def _tensors(root: dict[Any, Any]) -> dict[str, _Tensor]:
    return {str(name): value for name, value in root.items() if isinstance(value, _Tensor)}


def _description(path: Path) -> tuple[Any, str]:
    """(the unpickled object, the archive's folder name)."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if entry is None:
                raise SaeError(
                    f"{path}: is a zip file without data.pkl, so torch did not write it."
                )
            folder = entry.removesuffix("data.pkl")
            order = folder + "byteorder"
            if order in archive.namelist() and archive.read(order).strip() != b"little":
                raise SaeError(f"{path}: is stored big-endian; save it on another machine.")
            return _TensorsOnly(
                io.BytesIO(_stored(path, archive, entry, _MAX_PICKLE))
            ).load(), folder
    except zipfile.BadZipFile as error:
        raise SaeError(
            f"{path}: {error}. Wanted a zip as torch.save has written since 1.6; the file is "
            "truncated, a Git LFS pointer, or older. Download it again, or save it anew."
        ) from error
    except SaeError:
        raise
    except Exception as error:  # a hostile pickle can raise anything at all
        raise SaeError(
            f"{path} is refused: {error or type(error).__name__}. Only files that hold tensors "
            "and plain values are read; nothing from it was run."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The file as a zip. Raises: SaeError where it is none, or an entry of it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        raise SaeError(f"{path} is damaged: {error}. Download it again.") from error


def _stored(path: Path, archive: zipfile.ZipFile, entry: str, limit: int | None) -> bytes:
    """An entry's bytes. torch never compresses; a compressed entry could be a bomb."""
    info = archive.getinfo(entry)
    if info.compress_type != zipfile.ZIP_STORED or (limit and info.file_size > limit):
        raise SaeError(f"{path}: entry {entry} is compressed or too large; torch writes no such.")
    return archive.read(entry)


def _values(path: Path, folder: str, tensor: _Tensor) -> np.ndarray:
    with _opened(path) as archive:
        raw = _stored(path, archive, f"{folder}data/{tensor.key}", None)
    bits = _bits(tensor)
    flat = np.frombuffer(raw, dtype=bits, count=len(raw) // bits.itemsize)
    array = np.array(_view(path, flat, tensor))  # a copy: independent of the storage's extents
    return widen_bfloat16(array) if tensor.dtype == "bfloat16" else array


def _mapped(path: Path, folder: str, tensor: _Tensor) -> np.ndarray | None:
    """The same values, bfloat16 as its bits, still in the file."""
    entry = f"{folder}data/{tensor.key}"
    with _opened(path) as archive:
        start, size = place_in_zip(path, archive, entry), archive.getinfo(entry).file_size
    bits = _bits(tensor)
    if start is None or not math.prod(tensor.shape) or size < bits.itemsize:
        return None
    flat = np.memmap(path, bits, "r", offset=start, shape=(size // bits.itemsize,))
    return _view(path, flat, tensor)


def _bits(tensor: _Tensor) -> np.dtype:
    return np.dtype("<u2" if tensor.dtype == "bfloat16" else tensor.dtype)


def _view(path: Path, flat: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The tensor within its storage `flat`. Raises: SaeError where it reaches beyond."""
    size = flat.dtype.itemsize
    last = tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
    )
    if math.prod(tensor.shape) and last + 1 > len(flat):
        raise SaeError(
            f"{path} is damaged: a tensor of shape {list(tensor.shape)} needs "
            f"{(last + 1) * size} bytes, its storage has {len(flat) * size}. Download it again."
        )
    strides = tuple(stride * size for stride in tensor.strides)
    own = flat[tensor.offset :]
    return np.lib.stride_tricks.as_strided(own, tensor.shape, strides, writeable=False)
