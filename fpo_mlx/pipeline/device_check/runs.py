"""Forward passes, the start of training, and twenty updates, beside what the CPU makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import TrainConfig
from fpo_mlx.machine import device
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.model.load import dequantize
from fpo_mlx.model.trees import arrays_of, cast_floats
from fpo_mlx.pipeline.device_check import models
from fpo_mlx.pipeline.device_check.lines import Line
from fpo_mlx.pipeline.device_check.models import Packing, World
from fpo_mlx.pipeline.device_check.places import SMALL, Size, float_bits, on_cpu, under_test
from fpo_mlx.train import guard
from fpo_mlx.train.checkpoint import NoFolder
from fpo_mlx.train.events import StepReport
from fpo_mlx.train.gradients import GRADIENTS, Ground
from fpo_mlx.train.metrics import measure
from fpo_mlx.train.trainer import Trainer

UPDATES, RATE = 20, 1e-4  # small enough that rounding does not grow
BACKBONES: tuple[tuple[Packing, str], ...] = (
    ("affine", "float32"), ("affine", "bfloat16"), ("affine", "float16"), ("mxfp4", "bfloat16"),
)  # fmt: skip
FORWARD = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # relative, of hidden rows
GAP, FIRST_LOSS, TURNED = 2e-3, 1e-3, 0.02  # nats per token, nats, one less the cosine
TF32_FORWARD, TF32_CURVE, CURVE = 5e-3, 2e-2, 1e-3
VOCAB = 4_000  # of the models whose backbone is looked at
STARTS = [(24, 9, 14), (11, 16, 7), (30, 12, 12), (8, 5, 21)]  # tokens of the pairs


def backbones(size: Size) -> Iterator[Line]:
    """Forward passes through packed weights, of every packing and dtype."""
    with device.using(under_test()):
        exact = float_bits() == 23
        for packing, dtype in BACKBONES:
            bound = FORWARD[dtype] if exact else max(FORWARD[dtype], TF32_FORWARD)
            name = f"backbone, {packing} in 4 bits, {dtype}"
            yield Line("kernels", name, _forward(size, packing, dtype), bound)


def starts(size: Size, dtypes: Sequence[str] = ("bfloat16", "float16")) -> Iterator[Line]:
    """Before any update, in both half precisions."""
    with device.using(under_test()):
        for dtype in dtypes:
            yield from _start(size, dtype)


def updates() -> Iterator[Line]:
    """The curve of a short run."""
    with device.using(under_test()):
        bound = CURVE if float_bits() == 23 else TF32_CURVE
        yield Line("updates", f"{UPDATES} losses", _curve(), bound, "nats")


def _forward(size: Size, packing: Packing, dtype: str) -> float:
    """Final hidden rows against the same weights in float32 on the CPU."""
    config = models.llama(size, 2, min(size.vocab, VOCAB))
    model: Any = models.make(config, getattr(mx, dtype), packing)
    tokens = mx.array(models.random_pairs([(64, 1, 1)], config["vocab_size"], 1)[0].prompt[None])
    got = np.array(model.model(tokens).astype(mx.float32))
    with _widened(config, model, packing) as wide:
        want = np.array(wide.model(tokens))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@contextmanager
def _widened(config: dict, model: nn.Module, packing: Packing) -> Iterator[Any]:
    """The same stored numbers as the CPU takes them."""
    with on_cpu():
        wide = models.again(config, model, packing)
        dequantize(wide)
        cast_floats(wide, mx.float32)
        mx.eval(wide.parameters())
        wide.freeze()
        yield wide


def _start(size: Size, dtype: str) -> Iterator[Line]:
    """ln 2 at the start of FPO on 4-bit weights, and the first gradient."""
    config = models.llama(size, size.blocks, min(size.vocab, VOCAB))
    model = models.make(config, getattr(mx, dtype), "affine")
    pairs = models.random_pairs(STARTS, config["vocab_size"], 2)
    with _widened(config, model, "affine") as wide:
        want = _first_gradient(models.world(config, wide, size.features, pairs, 3))[1]
    world = models.world(config, model, size.features, pairs, 3)
    scorer = world.scorer("fpo")
    still = measure(scorer, world.data)
    gap = guard.gaps(still, world.data.refs, scorer.objective)[0]
    values, got = _first_gradient(world)
    model.eval()
    name = f"start, 4 bits and {dtype}"
    yield Line("start", f"{name}: |u| / beta", gap, GAP, "nats per token")
    off = abs(float(values["loss"].mean()) - float(np.log(2.0)))
    yield Line("start", f"{name}: first loss less ln 2", off, FIRST_LOSS, "nats")
    cosine = float(got @ want / (np.linalg.norm(got) * np.linalg.norm(want)))
    yield Line("start", f"{name}: gradient, 1 - cosine", 1 - cosine, TURNED)


def _first_gradient(world: World) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values of the pairs, and the adapters' gradient as one float64 vector."""
    everything = np.arange(len(world.data))
    config = TrainConfig(batch_size=len(world.data))
    ground = Ground(world.scorer("fpo"), world.data, config, Ranks())
    world.model.train()
    values, gradient = GRADIENTS["backward"](ground, everything, 0)
    world.model.eval()
    flat = [np.array(array).ravel() for _, array in arrays_of(gradient)]
    return values, np.concatenate(flat).astype(np.float64)


def _curve() -> float:
    """The largest difference of twenty training losses: tiny, float32, the same seeds."""
    config = models.llama(SMALL, 3, 300)
    model = models.make(config, mx.float32)
    pairs = models.random_pairs(STARTS, 300, 5)
    with on_cpu():
        want = _losses(models.world(config, models.again(config, model), 128, pairs, 6))
    return float(np.max(np.abs(_losses(models.world(config, model, 128, pairs, 6)) - want)))


def make_trainer(world: World) -> Trainer:
    """That writes nothing."""
    config = TrainConfig(
        batch_size=2, iters=UPDATES, steps_per_report=1, learning_rate=RATE, seed=7,
        save_every=UPDATES, max_start_gap=10.0,
    )  # fmt: skip
    return Trainer(world.scorer("fpo"), world.data, None, config, NoFolder(Path("nowhere")))


def _losses(world: World) -> np.ndarray:
    trainer = make_trainer(world)
    return np.array([step.loss for step in trainer.run() if isinstance(step, StepReport)])
