"""What depends on the device, in one record: chosen once, and by nothing else in the package.

A CPU runs one operation after the other: small tiles that stay in its cache, float32 weights. On a
GPU every operation is a launch: few and large ones, and the weights as they are stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

CGROUP = Path("/sys/fs/cgroup/memory.max")
MOST_STREAMS = 4
CACHE_SHARE, MOST_CACHE = 1 / 16, 2 << 30  # of the memory, and bytes: freed buffers that are kept
TILE_SHARE = 1 / 64  # of the memory: a tile of logits, of which some three live at once
CLEAR_ABOVE = 0.75  # of the cache's limit
SMALL, LARGE = 16 << 20, 256 << 20  # bytes of a tile, at least and at most


@dataclass(frozen=True)
class Device:
    """Sizes are in values, limits in bytes."""

    kind: Literal["cpu", "metal", "cuda"]
    widen: bool  # turn the weights into float32 at load
    fold: bool  # the softmax over tiles of the vocabulary; else over whole rows, a chunk at a time
    vocab_columns: int  # of a tile, where it is folded
    vocab_rows: int  # at once
    row_elements: int  # logits at once, where rows are whole
    wide_elements: int  # of a half-precision head's matrix that is widened at once
    pool_rows: int  # at once
    pool_elements: int  # activations at once
    top_elements: int  # the same where each tile's own top k is looked for
    sparse_decode: bool  # a dictionary is decoded from its k gathered rows
    streams: int  # side by side
    together: bool  # several short pairs in one pass, padded; else one after the other
    bucket: int  # sequences are padded to a multiple of it, so that freed buffers fit again
    ahead: int  # tiles that are allocated before the first is done
    cache_limit: int | None  # freed buffers that are kept; None: as MLX has it
    buffer_limit: int | None = None  # of one array, where there is such a limit

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"


def cpu(streams: int = 1) -> Device:
    """Tiles of a few MiB; the products of a BLAS are float32 only."""
    return Device(
        "cpu", widen=True, fold=True, vocab_columns=2048, vocab_rows=512, row_elements=1 << 23,
        wide_elements=1 << 23, pool_rows=1024, pool_elements=1 << 18, top_elements=1 << 20,
        sparse_decode=True, streams=streams, together=False, bucket=1, ahead=10,
        cache_limit=None,
    )  # fmt: skip


def gpu(kind: Literal["metal", "cuda"], memory: float, buffer_limit: int | None = None) -> Device:
    """Tiles of a 64th of the memory, 16 to 256 MiB. memory: bytes that MLX may use."""
    tile = int(min(max(memory * TILE_SHARE, SMALL), LARGE)) // 4
    return Device(
        kind, widen=False, fold=False, vocab_columns=32768, vocab_rows=1024, row_elements=tile,
        wide_elements=tile * 5 // 2, pool_rows=4096, pool_elements=tile, top_elements=tile,
        sparse_decode=False, streams=1, together=True, bucket=32, ahead=4,
        cache_limit=int(min(memory * CACHE_SHARE, MOST_CACHE)), buffer_limit=buffer_limit,
    )  # fmt: skip


_chosen: list[Device] = []  # the last one counts; tests put another on top


def here() -> Device:
    """The record of MLX's default device, chosen at the first call."""
    if not _chosen:
        _chosen.append(_find())
    return _chosen[-1]


@contextmanager
def using(record: Device) -> Iterator[Device]:
    """Another record, so that a GPU's branches run on a CPU."""
    here()
    _chosen.append(record)
    try:
        yield record
    finally:  # by identity: an equal record may lie below
        del _chosen[max(at for at, one in enumerate(_chosen) if one is record)]


def _find() -> Device:
    kind = backend()
    if kind == "cpu":
        return cpu(_cpu_streams())
    largest = info().get("max_buffer_length") if kind == "metal" else None
    return gpu(kind, memory(), int(largest) if largest else None)


@cache
def backend() -> Literal["cpu", "metal", "cuda"]:
    """What MLX's default device runs through."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def info() -> dict[str, str | int]:
    """What MLX says of its default device."""
    import mlx.core as mx

    return dict(mx.device_info())


def memory() -> float:
    """Bytes that MLX may use: Metal's recommended working set, a card's memory, or the host's."""
    kind = backend()
    if kind == "metal":
        return float(info()["max_recommended_working_set_size"])
    if kind == "cuda" and (whole := info().get("total_memory")):
        return float(whole)
    whole = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        return min(whole, float(CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return whole


def bound_cache() -> None:
    """From now on MLX keeps no more freed buffers than the record allows."""
    import mlx.core as mx

    if (limit := here().cache_limit) is not None:
        mx.set_cache_limit(limit)


def tidy() -> None:
    """After an update or a measured batch: give freed buffers back where they are over the limit.

    MLX itself drops them one by one; sizes that never come again would fill the whole limit.
    """
    import mlx.core as mx

    limit = here().cache_limit
    if limit is not None and mx.get_cache_memory() > CLEAR_ABOVE * limit:
        mx.clear_cache()


@contextmanager
def resident(share: float, processes: int = 1) -> Iterator[None]:
    """Weights stay wired while long work runs; the limit is as it was afterwards.

    share: of Metal's recommended working set, 0 for none; divided by the processes of a launcher
    that may run on one machine. Does nothing without Metal.
    """
    if share == 0 or here().kind != "metal" or backend() != "metal":
        yield
        return
    import mlx.core as mx

    before = mx.set_wired_limit(int(share * memory() / max(processes, 1)))
    try:
        yield
    finally:
        mx.set_wired_limit(before)


def _cpu_streams() -> int:
    """One per core, fewer where the BLAS has fewer threads."""
    limits = [os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")]
    allowed = [int(limit) for limit in limits if limit.isdigit() and int(limit) > 0]
    return min([MOST_STREAMS, os.cpu_count() or 1, *allowed])
