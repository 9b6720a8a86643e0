"""A fast BLAS for MLX's CPU build on Linux.

The Linux wheel of MLX carries the slow reference BLAS (2 to 5 GFLOP/s where OpenBLAS reaches 130
to 170 on the same core). Symbols of a library that was loaded with RTLD_GLOBAL win, so an OpenBLAS
that is loaded before `mlx.core` is the one that MLX calls: `machine.set_up` comes first.

Two sources, in this order: the system's OpenBLAS; else the one inside numpy's wheel, whose
functions have other names and 64-bit sizes, through a bridge of a few lines of C. The bridge is
compiled once (g++ is there anyway: MLX's CPU build calls it) and kept in the cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fpo_mlx.storage.paths import cache_root

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
_NEEDED = ("cblas_sgemm", "sgemm_")

# The calls that dominate: MLX's matrix products (cblas_*gemm) and those inside LAPACK (*gemm_).
_BRIDGE = """
#include <stdint.h>
typedef int64_t wide;
#define GEMM(p, T) \\
  void scipy_cblas_##p##gemm64_(int, int, int, wide, wide, wide, T, const T*, wide, const T*, \\
                                wide, T, T*, wide); \\
  void scipy_##p##gemm_64_(const char*, const char*, const wide*, const wide*, const wide*, \\
                           const T*, const T*, const wide*, const T*, const wide*, const T*, T*, \\
                           const wide*, long, long); \\
  void cblas_##p##gemm(int order, int ta, int tb, int m, int n, int k, T alpha, const T* a, \\
                       int lda, const T* b, int ldb, T beta, T* c, int ldc) { \\
    scipy_cblas_##p##gemm64_(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); \\
  } \\
  void p##gemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k, \\
                const T* alpha, const T* a, const int* lda, const T* b, const int* ldb, \\
                const T* beta, T* c, const int* ldc) { \\
    wide M = *m, N = *n, K = *k, A = *lda, B = *ldb, C = *ldc; \\
    scipy_##p##gemm_64_(ta, tb, &M, &N, &K, alpha, a, &A, b, &B, beta, c, &C, 1, 1); \\
  }
GEMM(s, float)
GEMM(d, double)
"""


@dataclass(frozen=True)
class BlasStatus:
    """What `preload` found. `library` is None where MLX uses its own BLAS."""

    library: str | None
    why: str  # one sentence for `fpo-mlx doctor`


_status: BlasStatus | None = None


def preload() -> BlasStatus:
    """Loads OpenBLAS once, where it helps and can be had; never fails and never prints.

    Afterwards: what MLX multiplies matrices with in this process.
    `FPO_MLX_BLAS` chooses: a library file, `numpy` (the bridge) or `none`.
    """
    global _status
    if _status is None:
        _status = _load()
    return _status


def _load() -> BlasStatus:
    if not sys.platform.startswith("linux"):
        return BlasStatus(None, "MLX uses Accelerate and Metal here; nothing to load.")
    chosen = os.environ.get("FPO_MLX_BLAS", "")
    if chosen == "none":
        return BlasStatus(None, "FPO_MLX_BLAS=none: MLX's own slow reference BLAS.")
    if "mlx.core" in sys.modules:
        return BlasStatus(None, "mlx was imported before fpo_mlx: its own BLAS stays.")
    if chosen != "numpy":
        for name in (chosen,) if chosen else (*LIBRARIES, *_beside_python()):
            if _loaded(name):
                return BlasStatus(name, f"{name}, loaded before MLX.")
    if chosen in ("", "numpy") and (bridged := _load_bridge()):
        return BlasStatus(bridged, f"The OpenBLAS of numpy's wheel, through {bridged}.")
    return BlasStatus(
        None,
        "No OpenBLAS found: MLX's own reference BLAS is about 50 times slower. "
        "Install OpenBLAS (Debian, Ubuntu: apt-get install libopenblas0-pthread) or a C compiler.",
    )


def _loaded(name: str) -> bool:
    """Puts the library's symbols in front of all later ones; False if it is absent or no BLAS."""
    try:
        local = ctypes.CDLL(name)
        if not all(_has(local, symbol) for symbol in _NEEDED):
            return False
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _has(library: ctypes.CDLL, symbol: str) -> bool:
    try:
        library[symbol]
    except AttributeError:
        return False
    return True


def _beside_python() -> list[str]:
    """OpenBLAS beside this Python (conda puts it there)."""
    return sorted(str(path) for path in (Path(sys.prefix) / "lib").glob("libopenblas.so*"))


def _load_bridge() -> str | None:
    """Loads numpy's OpenBLAS and the bridge to it; the bridge's path, or None."""
    source = _numpy_library()
    if source is None:
        return None
    try:
        ctypes.CDLL(str(source), mode=ctypes.RTLD_GLOBAL)
        bridge = _bridge_file()
        return str(bridge) if bridge and _loaded(str(bridge)) else None
    except OSError:
        return None


def _numpy_library() -> Path | None:
    """The OpenBLAS that numpy's Linux wheels carry, found without importing numpy."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent.parent / "numpy.libs"
    return next(iter(sorted(folder.glob("libscipy_openblas64_*.so"))), None)


def _bridge_file() -> Path | None:
    """The compiled bridge in the cache; compiles it the first time. None without a compiler."""
    digest = hashlib.sha256(_BRIDGE.encode()).hexdigest()[:12]
    target = cache_root() / "blas" / f"bridge-{platform.machine()}-{digest}.so"
    if target.exists():
        return target
    names = (os.environ.get("CXX"), os.environ.get("CC"), "c++", "g++", "cc", "gcc", "clang")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-x", "c", "-O2", "-shared", "-fPIC", "-o", str(scratch), "-"]
    try:
        done = subprocess.run(command, input=_BRIDGE.encode(), capture_output=True, timeout=60)
        if done.returncode:
            return None
        os.replace(scratch, target)  # another process may do the same: the bytes are equal
    except subprocess.TimeoutExpired:
        return None
    finally:
        scratch.unlink(missing_ok=True)
    return target
