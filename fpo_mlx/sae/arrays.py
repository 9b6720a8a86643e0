"""Tensor files as numpy, without torch and without running any code from the file.

Each opener returns a `TensorFile`: names and shapes at once, values when asked for, as float32.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.sae.tensorfile import TensorFile, place_in_zip, widen_bfloat16
from fpo_mlx.sae.torchfile import open_torch
from fpo_mlx.storage.tensors import Tensor, read_header

# numpy dtype of each safetensors dtype; BF16 is read as its 16 bits and widened below
SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
# what a broken archive makes zipfile, zlib, numpy and the parser of its headers raise
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, TypeError,
    SyntaxError, tokenize.TokenError, NotImplementedError, RuntimeError, RecursionError,
    OverflowError, MemoryError, IndexError, struct.error, AttributeError,
)  # fmt: skip


def open_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFile:
    """Open .npz, .safetensors, or (only with `allow_pickle`) a torch zip file.

    Raises SaeError for anything else, and for truncated or malformed files.
    """
    if path.suffix == ".npz":
        return open_npz(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in PICKLED_SUFFIXES:
        refuse_pickle(str(path), allow_pickle)
        return open_torch(path)
    raise SaeError(f"{path}: wanted a .safetensors, .npz, .pt or .pth file.")


def refuse_pickle(name: str, allowed: bool) -> None:
    """Raise SaeError for the path or name of a pickled file, unless pickled files are allowed."""
    if name.endswith(PICKLED_SUFFIXES) and not allowed:
        raise SaeError(
            f"{name} is a pickled file, which can be made to run code by most loaders. "
            "Pass --allow-pickle to read it with a loader that admits tensors only, "
            "or convert it once with `fpo-mlx sae convert --allow-pickle`."
        )


def open_npz(path: Path) -> TensorFile:
    """A numpy archive of plain arrays; object arrays (pickles) are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {
                name[:-4]: _npy_shape(archive, name)
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except UNREADABLE as error:
        raise _unreadable(path, "an .npz archive", error) from error
    return TensorFile(
        path, shapes, lambda name: _npz_array(path, name), mapped=lambda name: _npz_map(path, name)
    )


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as stream:
        return _npy_header(stream)[0]


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _check_room(archive: zipfile.ZipFile, name: str) -> None:
    """An entry's header must not claim more than its bytes: numpy allocates first."""
    with archive.open(name) as stream:
        shape, _, dtype = _npy_header(stream)
        there = archive.getinfo(name).file_size
        if math.prod(shape) * max(dtype.itemsize, 1) > there:
            raise ValueError(f"{name} claims the shape {list(shape)} in {there} bytes")


def _npz_array(path: Path, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_room(archive, f"{name}.npy")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except UNREADABLE as error:
        raise _unreadable(path, "an .npz archive of plain arrays", error) from error


def _npz_map(path: Path, name: str) -> np.ndarray | None:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_room(archive, f"{name}.npy")
            with archive.open(f"{name}.npy") as stream:
                shape, fortran, dtype = _npy_header(stream)
                header = stream.tell()
            start = place_in_zip(path, archive, f"{name}.npy")
        plain = dtype.kind == "f" and dtype.isnative and math.prod(shape) > 0
        if start is None or not plain:
            return None
        order = "F" if fortran else "C"
        return np.memmap(path, dtype, "r", offset=start + header, shape=shape, order=order)
    except UNREADABLE as error:
        raise _unreadable(path, "an .npz archive of plain arrays", error) from error


def open_safetensors(path: Path) -> TensorFile:
    """safetensors, bfloat16 included. Every extent is checked against the file before any read."""
    try:
        header = read_header(path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise _unreadable(path, "a safetensors file", error) from error
    for name, tensor in header.tensors.items():
        _check_extent(path, name, tensor, size - header.end, header.end)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}

    def fetch(name: str) -> np.ndarray:
        tensor = header.tensors[name]
        dtype = np.dtype(SAFETENSORS_DTYPES[tensor.dtype])
        count = math.prod(tensor.shape)
        array = np.fromfile(path, dtype=dtype, count=count, offset=tensor.start)
        if tensor.dtype == "BF16":
            array = widen_bfloat16(array)
        return array.reshape(tensor.shape)

    def mapped(name: str) -> np.ndarray | None:
        tensor = header.tensors[name]
        dtype = np.dtype(SAFETENSORS_DTYPES[tensor.dtype])
        if not tensor.size:
            return None
        return np.memmap(path, dtype, "r", offset=tensor.start, shape=tensor.shape)

    return TensorFile(path, shapes, fetch, mapped=mapped)


def _check_extent(path: Path, name: str, tensor: Tensor, size: int, first: int) -> None:
    """size: bytes of data in the file; first: offset of the first of them."""
    if tensor.dtype not in SAFETENSORS_DTYPES:
        raise SaeError(
            f"{path}: tensor {name!r} is stored as {tensor.dtype}; wanted one of "
            f"{', '.join(SAFETENSORS_DTYPES)}. Convert it with the tool that wrote it."
        )
    end = tensor.start + tensor.size - first
    if end > size:
        raise SaeError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, the file has "
            f"{size}. Download it again."
        )
    if math.prod(tensor.shape) * np.dtype(SAFETENSORS_DTYPES[tensor.dtype]).itemsize != tensor.size:
        raise SaeError(
            f"{path}: tensor {name!r} of shape {list(tensor.shape)} and {tensor.dtype} has "
            f"{tensor.size} bytes. The header is damaged; download the file again."
        )


def _unreadable(path: Path, wanted: str, error: Exception) -> SaeError:
    return SaeError(
        f"{path} cannot be read: wanted {wanted}, found {error or type(error).__name__}. "
        "The file may be truncated, or a Git LFS pointer; download it again."
    )
