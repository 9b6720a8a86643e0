"""A fast BLAS is in front of MLX's own, and its products are right."""

import json
import os
import subprocess
import sys

import pytest

from fpo_mlx.machine import blas

PROBE = """
import json
from fpo_mlx.machine import blas
found = blas.preload()
import mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
a, b = (rng.standard_normal((96, 64)).astype(np.float32) for _ in range(2))
error = float(np.abs(np.array(mx.array(a) @ mx.array(b).T) - a @ b.T).max())
values = np.array(mx.linalg.svd(mx.array(a), stream=mx.cpu)[1])
svd = float(np.abs(values - np.linalg.svd(a, compute_uv=False)).max())
big = rng.standard_normal((768, 768)).astype(np.float32)
same = bool(np.array_equal(np.array(mx.array(big) @ mx.array(big)), big @ big))
print(json.dumps({"library": found.library, "error": error, "svd": svd, "same": same}))
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def probe(tmp_path, **environment):
    env = {**os.environ, "FPO_MLX_CACHE": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # silent
    return json.loads(done.stdout)


@linux
def test_the_bridge_makes_mlx_multiply_with_numpys_own_openblas(tmp_path):
    """To the bit what numpy gives; MLX's own kernel, 30 times slower, rounds otherwise."""
    if blas._numpy_library() is None:
        pytest.skip("this numpy carries no OpenBLAS of its own")
    plain = probe(tmp_path, FPO_MLX_BLAS="none", OPENBLAS_NUM_THREADS="1")
    bridged = probe(tmp_path, FPO_MLX_BLAS="numpy", OPENBLAS_NUM_THREADS="1")
    assert plain["library"] is None
    assert bridged["library"].startswith(str(tmp_path))
    assert bridged["error"] < 1e-4
    assert bridged["svd"] < 1e-3
    assert (plain["same"], bridged["same"]) == (False, True)


@linux
def test_a_library_that_is_absent_or_no_blas_leaves_mlx_as_it_is(tmp_path):
    for name in ("libnothing-of-the-kind.so", "libm.so.6"):
        found = probe(tmp_path, FPO_MLX_BLAS=name)
        assert found["library"] is None
        assert found["error"] < 1e-4


def test_the_bridge_is_not_built_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(blas.shutil, "which", lambda name: None)
    assert blas._bridge_file() is None
    assert list(tmp_path.rglob("*.so")) == []
