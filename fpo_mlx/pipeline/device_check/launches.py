"""How many operations a GPU would launch, counted in the graph, at Gemma-2-2b's shape.

Nothing is computed: the graph is built down a GPU's branches and exported. Views and shapes
(transpose, reshape, slices) are no launches.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from fpo_mlx.core import features
from fpo_mlx.core.linear_head import LinearHead, Packing
from fpo_mlx.core.vocabulary import tiled
from fpo_mlx.machine import device
from fpo_mlx.pipeline.device_check.lines import Line
from fpo_mlx.records import Activation

V, D, R, MEMORY = 256_000, 2304, 600, 16e9
VIEWS = (
    "Transpose", "Reshape", "Unflatten", "Flatten", "ExpandDims", "Squeeze", "Broadcast", "Slice",
    "Depends", "StopGradient", "Split", "Full", "View",
)  # fmt: skip
LOSS = {(4, True): 60, (4, False): 30, (None, True): 60, (None, False): 30}
POOLING = {1 << 14: 20, 1 << 16: 40, 1 << 20: 300}
SIZES = {1 << 14: "16k", 1 << 16: "65k", 1 << 20: "1M"}


def launches(*outputs: mx.array) -> int:
    """Primitives that do work behind these arrays, each once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "graph.dot")
        mx.export_to_dot(str(file), *outputs)
        text = file.read_text()
    names = Counter(re.findall(r'label ="([^"]+)", shape=rectangle', text))
    return sum(n for name, n in names.items() if not name.startswith(VIEWS))


def lines() -> Iterator[Line]:
    """On a GPU of 16 GB, whatever device is here."""
    with device.using(device.gpu("metal", MEMORY)):
        for (bits, grad), bound in LOSS.items():
            weights = "bfloat16" if bits is None else f"{bits} bits"
            name = f"head and loss, {weights}, {'with' if grad else 'without'} gradient"
            yield Line("launches", name, of_the_loss(bits, grad), bound)
        for kind in ("jumprelu", "topk"):
            for size, bound in POOLING.items():
                name = f"pooling, {kind}, {SIZES[size]} features"
                yield Line("launches", name, of_pooling(kind, size), bound)


def _head(bits: int | None) -> LinearHead:
    """Of nothing but zeros that are never made."""
    if bits is None:
        return LinearHead(mx.zeros((V, D), mx.bfloat16), cap=30.0)
    packing = Packing(
        mx.zeros((V, D // 64), mx.bfloat16), mx.zeros((V, D // 64), mx.bfloat16), 64, bits, "affine"
    )
    return LinearHead(mx.zeros((V, D * bits // 32), mx.uint32), packing=packing, cap=30.0)


def of_the_loss(bits: int | None, grad: bool) -> int:
    """bits: of the head's packing, None for bfloat16."""
    rows, targets = mx.zeros((R, D), mx.bfloat16), mx.zeros((R,), mx.int32)
    found = tiled(rows, targets, _head(bits), grad=grad)
    return launches(found.values, *([found.slopes] if found.slopes is not None else []))


def of_pooling(kind: Activation, size: int) -> int:
    """size: features of the SAE."""
    threshold = mx.zeros((size,)) if kind == "jumprelu" else None
    encoder = features.Encoder(
        kind, mx.zeros((size, D)), mx.zeros((size,)), mx.zeros((D,)), threshold, k=64
    )
    pooled, _ = features.pool(encoder, mx.zeros((R, D), mx.bfloat16), mx.zeros((2, R)))
    return launches(pooled)
