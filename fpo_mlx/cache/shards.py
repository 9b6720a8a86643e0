"""One shard file of a reference cache: rows to bytes, and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.numpy

from fpo_mlx.cache.identity import FORMAT, VERSION, CacheIdentity, Provenance
from fpo_mlx.errors import CacheMismatch, FpoError
from fpo_mlx.records import ResponseScore, SparseFeatures
from fpo_mlx.storage.tensors import Header, OpenFiles, Tensor, read_header

KEY_BYTES = 16
CHUNK = 1 << 20  # bytes read at a time
DTYPES = {
    name: np.dtype(code)
    for name, code in {"U8": "|u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}.items()
}
SMALL = {"keys": "U8", "logps": "F64", "tokens": "I32", "offsets": "I64"}
Row = tuple[bytes, ResponseScore]


class ShardGone(FpoError):
    """A shard that was there when its cache was opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} was removed while it was in use. Run the command again: it scores what is "
            "missing anew (`train --resume` goes on with the last checkpoint)."
        )


@dataclass(frozen=True)
class Shard:
    """An opened shard: what stays in memory, some 100 bytes per row; features stay on disk."""

    path: Path
    keys: tuple[bytes, ...]
    logps: np.ndarray  # float64 [n]
    tokens: np.ndarray  # int32 [n]
    offsets: tuple[np.ndarray, ...]  # int64 [n + 1] of each SAE
    places: tuple[tuple[int, int], ...]  # where indices and values of each SAE begin, bytes
    data_start: int  # bytes
    backend: str
    dtype: str
    sha256: str  # of everything behind the header


def check_score(where: str, score: ResponseScore, n_saes: int) -> None:
    """Raises FpoError when a score is not finite or not of the cache's shape."""
    if not np.isfinite(score.logps):
        raise FpoError(
            f"{where}: the reference model's log-prob is {score.logps}, not a finite number. "
            "The model overflows: try --backend torch --dtype float32, or check the weights."
        )
    if score.tokens < 1 or len(score.features) != n_saes:
        raise FpoError(
            f"{where}: a score of {score.tokens} tokens and {len(score.features)} feature vectors; "
            f"the cache wants at least 1 token and {n_saes} feature vectors."
        )
    for number, pooled in enumerate(score.features):
        _check_features(f"{where}, SAE {number}", pooled)


def _check_features(where: str, pooled: SparseFeatures) -> None:
    indices, values = np.asarray(pooled.indices), np.asarray(pooled.values)
    ascending = len(indices) == 0 or (indices[0] >= 0 and bool((np.diff(indices) > 0).all()))
    if indices.shape != values.shape or indices.ndim != 1 or not ascending:
        raise FpoError(f"{where}: feature indices must ascend from 0 on, one for each value.")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        bad = int(indices[np.argmin(finite)])
        raise FpoError(
            f"{where}: pooled feature {bad} is not a finite float32. "
            "The activations overflow: try --backend torch --dtype float32, or check the SAE."
        )


def keep_largest(pooled: SparseFeatures, keep: int | None) -> tuple[SparseFeatures, float, float]:
    """The `keep` largest magnitudes; the largest magnitude and sum of squares that were dropped."""
    if keep is None or len(pooled.indices) <= keep:
        return pooled, 0.0, 0.0
    order = np.argsort(-np.abs(pooled.values), kind="stable")
    kept, dropped = np.sort(order[:keep]), np.asarray(pooled.values[order[keep:]], np.float64)
    left = SparseFeatures(pooled.indices[kept], pooled.values[kept])
    return left, float(np.abs(dropped).max()), float((dropped**2).sum())


def encode_shard(rows: Sequence[Row], identity: CacheIdentity, made: Provenance) -> bytes:
    """The file of these rows: equal rows of equal identity and make give equal bytes."""
    n_saes = len(identity.saes)
    for key, score in rows:
        check_score(f"row {key.hex()}", score, n_saes)
    arrays = {
        "keys": np.frombuffer(b"".join(k for k, _ in rows), np.uint8).reshape(-1, KEY_BYTES),
        "logps": np.array([score.logps for _, score in rows], np.float64),
        "tokens": np.array([score.tokens for _, score in rows], np.int32),
    }
    for s in range(n_saes):
        arrays |= _feature_arrays(s, [score.features[s] for _, score in rows], identity)
    return _serialise(arrays, len(rows), identity, made)


def _feature_arrays(
    number: int, pooled: Sequence[SparseFeatures], identity: CacheIdentity
) -> dict[str, np.ndarray]:
    kept = [keep_largest(features, identity.pooled_keep) for features in pooled]
    sizes = [0, *(len(features.indices) for features, _, _ in kept)]
    arrays = {
        "offsets": np.cumsum(sizes, dtype=np.int64),
        "indices": np.concatenate([np.asarray(f.indices, np.int32) for f, _, _ in kept]),
        "values": np.concatenate([np.asarray(f.values, np.float32) for f, _, _ in kept]),
    }
    if identity.pooled_keep is not None:
        arrays["dropped"] = np.array([(top, mass) for _, top, mass in kept], np.float32)
    return {f"features.{number}.{name}": array for name, array in arrays.items()}


def _serialise(
    arrays: dict[str, np.ndarray], rows: int, identity: CacheIdentity, made: Provenance
) -> bytes:
    # the library orders metadata by a random hash, so one JSON text under one key keeps the bytes
    def pack(sha256: str) -> bytes:
        about = {
            "format": FORMAT,
            "version": VERSION,
            "identity": identity.digest(),
            "backend": made.backend,
            "dtype": made.dtype,
            "rows": rows,
            "sha256": sha256,
        }
        metadata = {"fpo_mlx": json.dumps(about, sort_keys=True)}
        return safetensors.numpy.save(arrays, metadata=metadata)

    draft = pack("0" * 64)
    return pack(hashlib.sha256(draft[_data_start(draft) :]).hexdigest())


def _data_start(head: bytes) -> int:
    return 8 + int.from_bytes(head[:8], "little")


def open_shard(path: Path, identity: CacheIdentity) -> Shard:
    """Read and check a shard's small arrays.

    Raises CacheMismatch when the shard is of another identity, FpoError when it is damaged.
    """
    try:
        header = read_header(path)
        about = json.loads(header.metadata["fpo_mlx"])
        found = {"format": about["format"], "version": about["version"]}
        if found != {"format": FORMAT, "version": VERSION}:
            raise CacheMismatch(
                f"{path} is {found['format']} version {found['version']}; this program reads "
                f"{FORMAT} version {VERSION}. Run `fpo-mlx precompute` into a new folder."
            )
        if about["identity"] != identity.digest():
            raise CacheMismatch(
                f"{path} belongs to another cache: its identity is {about['identity']}, the "
                f"manifest's is {identity.digest()}. Move it out of this folder."
            )
        return _read_small(path, header, about, len(identity.saes))
    except FpoError:
        raise
    except Exception as error:  # whatever json and numpy find wrong in broken bytes
        raise damaged(path, str(error)) from error


def _read_small(path: Path, header: Header, about: dict, n_saes: int) -> Shard:
    rows, tensors = int(about["rows"]), header.tensors
    _check_extents(path, tensors)
    with path.open("rb") as file:
        keys, logps, tokens, *offsets = (
            _read(file, tensors[name], name, shape)
            for name, shape in [
                ("keys", (rows, KEY_BYTES)), ("logps", (rows,)), ("tokens", (rows,)),
                *((f"features.{s}.offsets", (rows + 1,)) for s in range(n_saes)),
            ]
        )  # fmt: skip
    places = []
    for s, o in enumerate(offsets):
        values, indices = tensors[f"features.{s}.values"], tensors[f"features.{s}.indices"]
        if (values.dtype, indices.dtype) != ("F32", "I32") or values.shape != indices.shape:
            raise ValueError(f"SAE {s} has not as many indices as values")
        if o[0] != 0 or (np.diff(o) < 0).any() or values.shape != (o[-1],):
            raise ValueError(f"the offsets of SAE {s} do not fit its {values.shape} values")
        places.append((indices.start, values.start))
    return Shard(
        path=path,
        keys=tuple(bytes(key) for key in keys),
        logps=logps,
        tokens=tokens,
        offsets=tuple(offsets),
        places=tuple(places),
        data_start=header.end,
        backend=str(about["backend"]),
        dtype=str(about["dtype"]),
        sha256=str(about["sha256"]),
    )


def _check_extents(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises: ValueError when a tensor is not as long as its shape, or the file ends elsewhere."""
    for name, tensor in tensors.items():
        itemsize = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 0
        if math.prod(tensor.shape) * itemsize != tensor.size:
            raise ValueError(f"{name} of shape {tensor.shape} has {tensor.size} bytes")
    end = max(tensor.start + tensor.size for tensor in tensors.values())
    if path.stat().st_size != end:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {end}")


def _read(file: IO[bytes], tensor: Tensor, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A whole small array. Raises: ValueError when it is not of this shape and its own dtype."""
    dtype = SMALL[name.rpartition(".")[2]]
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}, not {dtype} {shape}")
    file.seek(tensor.start)
    return np.frombuffer(file.read(tensor.size), DTYPES[dtype]).reshape(shape)


def check_content(shard: Shard) -> None:
    """Raises ShardDamaged when the file's bytes are not those that were written, ShardGone."""
    digest = hashlib.sha256()
    with _reading(shard), shard.path.open("rb") as file:
        file.seek(shard.data_start)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    _compare(shard, digest.hexdigest())


def content(shard: Shard) -> bytes:
    """The whole file, checked. Raises: as `check_content`."""
    with _reading(shard):
        data = shard.path.read_bytes()
    _compare(shard, hashlib.sha256(data[shard.data_start :]).hexdigest())
    return data


def _compare(shard: Shard, sha256: str) -> None:
    if sha256 != shard.sha256:
        raise damaged(shard.path, "its content does not match its sha256")


@contextmanager
def _reading(shard: Shard) -> Iterator[None]:
    """What the system refuses, as what it means for the shard."""
    try:
        yield
    except FileNotFoundError as error:
        raise ShardGone(shard.path) from error
    except (OSError, ValueError) as error:
        raise damaged(shard.path, str(error)) from error


def read_features(
    shard: Shard, row: int, numbers: Sequence[int], files: OpenFiles
) -> tuple[SparseFeatures, ...]:
    """The pooled features of one row for the SAEs of these numbers. Raises: FpoError."""
    found = []
    with _reading(shard):
        for s in numbers:
            first, end = shard.offsets[s][row : row + 2].tolist()
            indices, values = (
                np.frombuffer(files.read(shard.path, start + 4 * first, 4 * (end - first)), dtype)
                for start, dtype in zip(shard.places[s], ("<i4", "<f4"), strict=True)
            )
            found.append(SparseFeatures(indices, values))
    return tuple(found)


class ShardDamaged(FpoError):
    """A shard whose bytes are not those that were written."""


def damaged(path: Path, why: str) -> ShardDamaged:
    return ShardDamaged(
        f"{path} is damaged: {why}. Delete this file and run `fpo-mlx precompute` again "
        "(it computes only the rows that are missing), or copy the cache once more."
    )
