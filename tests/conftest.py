"""Before any test imports MLX; and what several files of tests share."""

import contextlib
import os

import hypothesis
import pytest

from fpo_mlx import machine
from fpo_mlx.data import read

# Expectations are those of a CPU: a GPU sums in another order, and some multiply float32 as TF32.
# FPO_MLX_TEST_DEVICE=gpu leaves MLX its own default device.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
machine.set_up()
if os.environ.get("FPO_MLX_TEST_DEVICE", "cpu") == "cpu":
    with contextlib.suppress(ImportError):
        import mlx.core

        mlx.core.set_default_device(mlx.core.cpu)
# a machine that is busy with something else is no fault of the code
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def no_splits_known():
    """Each test has a hub of its own."""
    read.hub_names.cache_clear()


@pytest.fixture(scope="module")
def one_torch_thread():
    """On arrays as small as the tests', threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
