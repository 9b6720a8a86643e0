"""A fast BLAS for MLX's CPU build on Linux.

The Linux wheel of MLX carries the slow reference BLAS (2 GFLOP/s where OpenBLAS reaches 130).
Symbols of a library loaded with RTLD_GLOBAL win, so an OpenBLAS that is loaded before `mlx.core`
is the one that MLX calls. Every module of ours that imports MLX calls `preload` first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
_NEEDED = ("cblas_sgemm", "sgemm_")


@dataclass(frozen=True)
class BlasStatus:
    """What `preload` found. `library` is None where MLX uses its own BLAS."""

    library: str | None
    why: str  # one sentence for `fpo-mlx doctor`


_status: BlasStatus | None = None


def preload() -> BlasStatus:
    """Loads OpenBLAS once, where it helps and is there; never fails and never prints.

    `FPO_MLX_BLAS` names another library file, or `none`.
    """
    global _status
    if _status is None:
        _status = _load()
    return _status


def status() -> BlasStatus:
    """What MLX multiplies matrices with in this process."""
    return preload()


def _load() -> BlasStatus:
    if not sys.platform.startswith("linux"):
        return BlasStatus(None, "MLX uses Accelerate and Metal here; nothing to load.")
    chosen = os.environ.get("FPO_MLX_BLAS")
    if chosen == "none":
        return BlasStatus(None, "FPO_MLX_BLAS=none: MLX's own slow reference BLAS.")
    if "mlx.core" in sys.modules:
        return BlasStatus(None, "mlx was imported before fpo_mlx: its own BLAS stays.")
    for name in (chosen,) if chosen else (*LIBRARIES, *_in_environment()):
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if all(_has(library, symbol) for symbol in _NEEDED):
            return BlasStatus(name, f"{name}, loaded before MLX.")
    return BlasStatus(
        None,
        "No OpenBLAS found: MLX's own reference BLAS is about 50 times slower. "
        "Install it (Debian, Ubuntu: apt-get install libopenblas0-pthread).",
    )


def _in_environment() -> list[str]:
    """OpenBLAS beside this Python (conda puts it there)."""
    return sorted(str(path) for path in (Path(sys.prefix) / "lib").glob("libopenblas.so*"))


def _has(library: ctypes.CDLL, symbol: str) -> bool:
    try:
        library[symbol]
    except AttributeError:
        return False
    return True
