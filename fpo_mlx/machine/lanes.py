"""Work side by side on a CPU.

MLX's CPU build runs one operation after the other in one thread; only the BLAS uses several. Two
streams are two threads. On a GPU, parallel within each operation, there is one lane: the stream
that is the default anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

MOST = 4


@cache
def _streams(count: int) -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(count)]


def count() -> int:
    """Number of CPU streams to use: one per core, fewer where the BLAS has fewer threads."""
    if mx.default_device() != mx.cpu:
        return 1
    limits = [os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")]
    allowed = [int(limit) for limit in limits if limit.isdigit() and int(limit) > 0]
    return min([MOST, os.cpu_count() or 1, *allowed])


@contextmanager
def lane(number: int) -> Iterator[None]:
    """Operations made in here go to this lane."""
    lanes = count()
    if lanes == 1:
        yield
    else:
        with mx.stream(_streams(lanes)[number % lanes]):
            yield


def shares(rows: int, least: int = 1) -> list[slice]:
    """The rows cut in equal parts, one a lane; fewer where a part would have under `least` rows."""
    parts = max(1, min(count(), rows // least))
    size = -(-rows // parts)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
