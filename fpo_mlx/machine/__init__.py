"""What this machine is and how it is set up: BLAS, heap, streams, processes, memory."""

from __future__ import annotations

from fpo_mlx.machine import blas, heap


def set_up() -> None:
    """Prepare this process for MLX: call it once, before the first import of `mlx.core`.

    On Linux it puts OpenBLAS in front of MLX's slow BLAS and lets freed memory stay with the
    process; elsewhere it does nothing. It changes settings of the whole process, so importing
    `fpo_mlx` does not do it: the command line and the functions of the public API do.
    """
    blas.preload()
    heap.keep_freed()
