"""Work side by side on a CPU.

MLX's CPU build runs one operation after the other in one thread; only the BLAS uses several. Two
streams are two threads. On a GPU, parallel within each operation, there is one lane: the stream
that is the default anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

from fpo_mlx.machine import device


@cache
def _streams(count: int) -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(count)]


def count() -> int:
    """Number of streams to use."""
    return device.here().streams


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
