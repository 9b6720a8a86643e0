"""The C library keeps freed memory: the same pages serve the next array."""

import subprocess
import sys

import pytest

from fpo_mlx.machine import heap

COUNT = """
import resource
import numpy as np
{first}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(4 << 20, dtype=np.float32)
before = faults()
np.ones(4 << 20, dtype=np.float32)
print(faults() - before)
"""


def page_faults(first: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(first=first)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not heap.keep_freed(), reason="no GNU C library here")
def test_a_second_array_of_16_mib_takes_the_pages_of_the_first() -> None:
    assert page_faults("from fpo_mlx import machine; machine.set_up()") < page_faults("") / 4


def test_without_the_gnu_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert heap.keep_freed() is False
