"""Times of training steps beside mlx-lm's, their memory beside `plan`'s, and the device's bound."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from fpo_mlx.config import TrainConfig
from fpo_mlx.machine import device, memory
from fpo_mlx.machine.memory import Lengths, ModelShape, SaeShape, Setup, Tiles
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model import adapters
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.pipeline.device_check import models
from fpo_mlx.pipeline.device_check.lines import Line
from fpo_mlx.pipeline.device_check.models import World
from fpo_mlx.pipeline.device_check.places import Size, under_test
from fpo_mlx.pipeline.doctor import product_rate
from fpo_mlx.pipeline.plan import adapted_of, shape_of
from fpo_mlx.records import TokenPair
from fpo_mlx.train.gradients import GRADIENTS, Ground
from fpo_mlx.train.optimizer import gradient_norm, make_optimizer, make_update
from fpo_mlx.train.scoring import Scorer

Step = Callable[[], None]
OVER_SIMPO, OVER_SFT = 1.03, 0.6  # of FPO's time, on a GPU
OVER_PLAN = 1.1  # of the predicted peak
RATE = 1e-9  # of learning: every step of a time is the first one


def lines(size: Size, gpu: bool) -> Iterator[Line]:
    """gpu: hold times and the peak to their bounds; a CPU's at small sizes say nothing of them."""
    limit = under_test().cache_limit or 0
    before = mx.set_cache_limit(limit)
    try:
        with device.using(under_test()):
            yield from _lines(size, gpu, limit)
    finally:
        mx.set_cache_limit(before)


def _lines(size: Size, gpu: bool, limit: int) -> Iterator[Line]:
    config = models.gemma(size)
    model = models.make(config, mx.bfloat16, "affine")
    shape = shape_of(model, config, share_prompt=True)
    rival = models.again(config, model, "affine")
    pair = models.random_pairs([size.pair], config["vocab_size"], 1)[0]
    world = models.world(config, model, size.features, [pair], 2)
    layers = min(models.LAYERS, len(blocks_of(rival)))
    lora = {"rank": models.RANK, "scale": models.SCALE, "dropout": 0.0}
    mlx_lm_lora(rival, layers, lora)
    steps = {
        "FPO": our_step(world.scorer("fpo"), world),
        "SimPO": our_step(world.scorer("simpo"), world),
        "mlx-lm SFT": sft_step(rival, pair),
    }
    steps["FPO"]()  # the optimizer's state is there by then
    mx.reset_peak_memory()
    steps["FPO"]()
    peak, cached = mx.get_peak_memory(), mx.get_cache_memory()
    seconds = timed(steps, size.rounds)
    for name, taken in seconds.items():
        yield Line("speed", f"{name}, one pair", taken, unit="s")
    over = {"SimPO": OVER_SIMPO, "mlx-lm SFT": OVER_SFT}
    for name, bound in over.items():
        ratio = seconds["FPO"] / seconds[name]
        yield Line("speed", f"FPO / {name}", ratio, bound if gpu else None)
    yield from _rate(size, shape, world, seconds["FPO"])
    yield from _memory(shape, world, peak, bound=OVER_PLAN if gpu else None)
    yield Line("memory", "freed buffers kept", cached / 1e9, limit / 1e9, "GB")


def our_step(scorer: Scorer, world: World) -> Step:
    """The gradient of all pairs and one update."""
    config = TrainConfig(batch_size=len(world.data), learning_rate=RATE)
    optimizer = make_optimizer(config)
    optimizer.init(world.model.trainable_parameters())
    update = make_update(optimizer, config.max_grad_norm or 0.0)
    ground, everything = Ground(scorer, world.data, config, Ranks()), np.arange(len(world.data))

    def step() -> None:
        world.model.train()
        _, gradient = GRADIENTS["backward"](ground, everything, 0)
        world.model.eval()
        new = update(gradient, gradient_norm(gradient), world.model.trainable_parameters())
        world.model.update(new)
        mx.eval(new, optimizer.state)

    return step


def mlx_lm_lora(model: nn.Module, layers: int, config: Mapping[str, Any]) -> None:
    """mlx-lm's own adapters on the last blocks."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(model, layers, dict(config))


def sft_step(model: nn.Module, pair: TokenPair) -> Step:
    """mlx-lm's own step on both responses: its batch, its loss, compiled as it compiles them."""
    with leaning_on("mlx-lm", "its step of supervised training"):
        from mlx_lm.tuner.trainer import default_loss, iterate_batches

    sequences = [
        (np.concatenate([pair.prompt, response]).tolist(), len(pair.prompt))
        for response in pair.responses
    ]
    batch = next(iterate_batches(sequences, 2, 8192))
    optimizer = optim.Adam(learning_rate=RATE)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradient = loss_and_grad(model, tokens, lengths)
        optimizer.update(model, gradient)
        return loss, count

    def step() -> None:
        model.train()
        loss, count = update(*batch)
        mx.eval(state, loss, count)

    return step


def timed(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn; the first round is not counted."""
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            mx.synchronize()
            started = time.perf_counter()
            step()
            mx.synchronize()
            if turn:
                seen[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seen.items()}


def _rate(size: Size, shape: ModelShape, world: World, seconds: float) -> Iterator[Line]:
    bound = product_rate(size.square, 5, mx.bfloat16)
    yield Line("speed", f"product of bfloat16, {size.square} square", bound / 1e12, unit="TFLOP/s")
    setup, lengths, saes = _setup(world)
    work = memory.train_flops(shape, saes, setup, lengths)
    yield Line("speed", "FPO's share of that rate", work / seconds / bound)


def _setup(world: World) -> tuple[Setup, Lengths, list[SaeShape]]:
    """As `plan` would see this run."""
    pair, encoder = world.data.pairs[0], world.encoders[0]
    block = adapters.block_of(world.model)
    arrays = adapters.parameters(world.model)
    adapted = {block[name.rpartition(".")[0]] for name, _ in arrays}
    setup = Setup(
        min(adapted), max(adapted), sum(array.size for _, array in arrays), batch_size=1,
        adapted=adapted_of(world.model, world.config),
    )  # fmt: skip
    lengths = Lengths(len(pair.prompt), len(pair.chosen), len(pair.rejected))
    assert encoder.w_enc is not None
    return setup, lengths, [SaeShape(encoder.n_features, encoder.w_enc.shape[1])]


def _memory(shape: ModelShape, world: World, peak: float, bound: float | None) -> Iterator[Line]:
    setup, lengths, saes = _setup(world)
    tiles = Tiles.of(device.here())
    terms = memory.train_terms(shape, saes, setup, tiles, lengths)
    predicted = memory.total(terms)
    yield Line("memory", "peak of FPO, one pair", peak / 1e9, unit="GB")
    yield Line("memory", "peak over what plan says", peak / predicted, bound)
