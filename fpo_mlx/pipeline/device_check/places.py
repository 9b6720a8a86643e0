"""Where a kernel runs: the device under test, and the CPU that it is held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fpo_mlx.machine import device
from fpo_mlx.machine.device import Device


@dataclass(frozen=True)
class Size:
    """How large everything is. The small one is for a CPU and for tests."""

    name: str
    vocab: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    features: int
    rows: int  # response positions of the kernels
    square: int  # of the product that the rate is taken from
    blocks: int  # of the model whose start is looked at
    pair: tuple[int, int, int]  # tokens of prompt, chosen and rejected, for times and memory
    rounds: int  # of which a time is the median


REAL_BYTES = 10e9  # that MLX must have for the real size, which takes 8 to 9.5
REAL = Size("real", 128_256, 2048, 8192, 32, 8, 16_384, 256, 4096, 4, (512, 300, 300), 3)
SMALL = Size("small", 1_000, 64, 128, 4, 2, 512, 32, 256, 2, (12, 10, 8), 2)


def under_test() -> Device:
    """This device's record; on a CPU a GPU's, whose branches can run there too."""
    here = device.here()
    return here if here.gpu else device.gpu("metal", device.memory())


@contextmanager
def on_cpu() -> Iterator[None]:
    """The CPU, and its own branches."""
    import mlx.core as mx

    before: Any = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with device.using(device.cpu()):
            yield
    finally:
        mx.set_default_device(before)


def float_bits() -> int:
    """Bits behind the point that a float32 product keeps of its factors: 23, or 10 as TF32."""
    import mlx.core as mx

    n = 256
    factor = mx.full((n, n), 1.0 + 2.0**-13)
    product = (factor @ mx.eye(n)).max().item()
    return 23 if product > 1.0 else 10  # type: ignore[operator]
