"""How many operations a GPU would launch, counted in the graph, at Gemma-2-2b's shape.

    python scripts/checks/launches.py

Nothing is computed: the graph is built down the GPU's branches and exported. Views and shapes
(transpose, reshape, slices) are no launches. Exits with 1 above the bounds.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

import mlx.core as mx

from fpo_mlx.core import features
from fpo_mlx.core.linear_head import LinearHead, Packing
from fpo_mlx.core.vocabulary import tiled_logps
from fpo_mlx.machine import device

V, D, R, MEMORY = 256_000, 2304, 600, 16e9
VIEWS = (
    "Transpose", "Reshape", "Unflatten", "Flatten", "ExpandDims", "Squeeze", "Broadcast", "Slice",
    "Depends", "StopGradient", "Split", "Full", "View",
)  # fmt: skip


def launches(*outputs: mx.array) -> int:
    """Primitives that do work behind these arrays, each once."""
    with tempfile.NamedTemporaryFile(suffix=".dot", mode="r") as file:
        mx.export_to_dot(file.name, *outputs)
        text = Path(file.name).read_text()
    names = Counter(re.findall(r'label ="([^"]+)", shape=rectangle', text))
    return sum(n for name, n in names.items() if not name.startswith(VIEWS))


def head(bits: int | None) -> LinearHead:
    """Of nothing but zeros that are never made."""
    if bits is None:
        return LinearHead(mx.zeros((V, D), mx.bfloat16), cap=30.0)
    packing = Packing(
        mx.zeros((V, D // 64), mx.bfloat16), mx.zeros((V, D // 64), mx.bfloat16), 64, bits, "affine"
    )
    return LinearHead(mx.zeros((V, D * bits // 32), mx.uint32), packing=packing, cap=30.0)


def of_the_loss(bits: int | None, grad: bool) -> int:
    rows, targets = mx.zeros((R, D), mx.bfloat16), mx.zeros((R,), mx.int32)
    found = tiled_logps(rows, targets, head(bits), grad=grad)
    return launches(found.values, *([found.slopes] if found.slopes is not None else []))


def of_pooling(kind: str, size: int) -> int:
    threshold = mx.zeros((size,)) if kind == "jumprelu" else None
    encoder = features.Encoder(
        kind, mx.zeros((size, D)), mx.zeros((size,)), mx.zeros((D,)), threshold, k=64
    )
    pooled, _ = features.pool(encoder, mx.zeros((R, D), mx.bfloat16), mx.zeros((2, R)))
    return launches(pooled)


def main() -> int:
    bounds = {
        "head and loss, 4 bits, with gradient": (of_the_loss, (4, True), 60),
        "head and loss, 4 bits, without": (of_the_loss, (4, False), 30),
        "head and loss, bfloat16, with gradient": (of_the_loss, (None, True), None),
        "head and loss, bfloat16, without": (of_the_loss, (None, False), None),
        "JumpReLU pooling, 16k": (of_pooling, ("jumprelu", 1 << 14), 20),
        "JumpReLU pooling, 65k": (of_pooling, ("jumprelu", 1 << 16), 40),
        "JumpReLU pooling, 1M": (of_pooling, ("jumprelu", 1 << 20), 300),
        "TopK pooling, 16k": (of_pooling, ("topk", 1 << 14), 20),
        "TopK pooling, 65k": (of_pooling, ("topk", 1 << 16), 40),
        "TopK pooling, 1M": (of_pooling, ("topk", 1 << 20), 300),
    }
    held = True
    with device.using(device.gpu("metal", MEMORY)):
        for name, (count, arguments, bound) in bounds.items():
            found = count(*arguments)
            over = bound is not None and found > bound
            held &= not over
            print(f"{name:42} {found:5}{'' if bound is None else f'  of {bound} at most'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
