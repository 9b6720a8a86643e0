"""Before any test imports MLX; and what several files of tests share."""

import hypothesis
import pytest

from fpo_mlx import machine

machine.set_up()
# a machine that is busy with something else is no fault of the code
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module")
def one_torch_thread():
    """On arrays as small as the tests', threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
