"""Where the gradient of an update comes from: backpropagation, or forward passes alone.

Either is a function of the pairs of an update and gives their values and a gradient of the mean
loss by the adapters, the same to the bit on every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from fpo_mlx.config import Objective, TrainConfig
from fpo_mlx.core.objectives import PairLosses, Seen, preference_losses
from fpo_mlx.data import micro_batches
from fpo_mlx.machine import device
from fpo_mlx.machine.parallel import Part, Ranks
from fpo_mlx.model import adapters, randomness
from fpo_mlx.train.metrics import ScoredPairs, joined, pair_metrics
from fpo_mlx.train.optimizer import gradient_norm
from fpo_mlx.train.scoring import Measures, Scorer

PULL, TRIES = 64.0, 5  # of a float16 model's scaled loss: what a token feels; how often to lower
RISE = "rise"  # the loss at t + e UV^T less that at t - e UV^T
Values = dict[str, np.ndarray]  # [B] each, as `metrics.pair_metrics` names them


@dataclass(frozen=True)
class Ground:
    """What a gradient is taken of, and how much of it at once."""

    scorer: Scorer
    data: ScoredPairs
    config: TrainConfig
    ranks: Ranks


# Values and gradient of the pairs `indices` (of ground.data), update number `update` from 0.
Gradient = Callable[[Ground, np.ndarray, int], tuple[Values, Any]]


def backward(ground: Ground, indices: np.ndarray, update: int) -> tuple[Values, Any]:
    """By backpropagation, a few pairs in memory at a time.

    Each process adds up its own part; a mean over all pairs is the sum of the parts.
    """
    scorer, own, total, parts = ground.scorer, ground.ranks.part(len(indices)), None, []
    # an idle process runs one pair so that the processes' sums match; its weight is 0
    count = math.inf if own.idle else len(indices)

    def loss(some: ScoredPairs, factor: float) -> tuple[mx.array, PairLosses, Measures]:
        losses, measures = scorer.losses(some.pairs, some.refs, grad=True)
        return losses.losses.sum() * factor, losses, measures

    value_and_grad = nn.value_and_grad(scorer.policy.model, loss)
    for some in _micro_batches(ground, indices, own):
        if scorer.policy.dtype == mx.float16:
            (_, losses, measures), gradient = _scaled(value_and_grad, scorer.objective, some, count)
        else:
            (_, losses, measures), gradient = value_and_grad(some, 1.0 / count)
        total = gradient if total is None else tree_map(mx.add, total, gradient)
        mx.eval(total, losses, vars(measures))
        del gradient  # else it is there beside `total` all through the next pass
        device.tidy()
        parts.append(pair_metrics(losses, measures, scorer.half))
    return ground.ranks.gather(joined(parts), own, len(indices)), ground.ranks.sum(total)


def _scaled(
    value_and_grad: Callable[..., Any], o: Objective, some: ScoredPairs, count: float
) -> tuple[Any, Any]:
    """Through a float16 model: the loss goes backward times a power of two, the float32 gradient is
    divided by it again, by the number of pairs only then.

    So the size of an update does not matter. A token's pull starts near `PULL`, far from both ends
    of float16 (6e-8 to 65,504); where it grows past the upper one on the way, less is tried.
    """
    shortest = min(len(side) for pair in some.pairs for side in pair.responses)
    scale = PULL * (shortest if o.length_normalize else 1) / o.beta
    scale, start = 2.0 ** round(math.log2(scale)), randomness.position()
    for _ in range(TRIES):
        randomness.go_to(start)  # drop what was dropped
        found, gradient = value_and_grad(some, scale)
        back = 1.0 / (scale * count)
        gradient = tree_map(lambda g, back=back: g * back, gradient)
        if math.isfinite(gradient_norm(gradient).item()):  # type: ignore[arg-type]
            break
        scale /= 16.0
    return found, gradient


def forward(ground: Ground, indices: np.ndarray, update: int) -> tuple[Values, Any]:
    """From two passes without gradient: c UV^T / r, c = [F(t + e UV^T) - F(t - e UV^T)] / 2e.

    F: the mean loss, t: each matrix of the adapters, r: the columns of U and V. U is drawn anew for
    every update, V for every `forward_interval`, both from the seed and the update's number, so
    there is nothing to keep. The mean over U and V is the gradient, but for terms in e^2. Values
    are means of the two passes. No input is dropped. Source: LOZO (arXiv 2410.07698), Alg. 1.
    """
    config, model = ground.config, ground.scorer.policy.model
    own, epsilon = ground.ranks.part(len(indices)), config.forward_epsilon
    here = dict(adapters.parameters(model))
    moves = directions(here, config, update)
    sides = [
        {name: at + sign * epsilon * moves[name] for name, at in here.items()} for sign in (1, -1)
    ]
    training, parts = model.training, []
    model.eval()
    try:
        for some in _micro_batches(ground, indices, own):
            parts.append(_two_passes(ground.scorer, some, sides))
            device.tidy()
    finally:
        adapters.update(model, here)
        model.train(training)
    values = ground.ranks.gather(joined(parts), own, len(indices))
    slope = float(values.pop(RISE).mean(dtype=np.float64)) / (2 * epsilon * config.forward_rank)
    gradient = tree_unflatten([(name, slope * move) for name, move in moves.items()])
    return values, ground.ranks.from_first(gradient)  # another machine may round otherwise


def _two_passes(
    scorer: Scorer, some: ScoredPairs, sides: Sequence[Mapping[str, mx.array]]
) -> dict[str, np.ndarray]:
    """Means over the two sides of every value, and by how much the first loss is the higher.

    What a stop-gradient holds is taken half way, so that it does not count in the difference.
    """
    o, seen, measures = scorer.objective, [], []
    for side in sides:
        adapters.update(scorer.policy.model, side)
        now, measured = scorer.see(some.pairs, some.refs, grad=False)
        mx.eval([part for part in now if isinstance(part, mx.array)])
        seen.append(now)
        measures.append(measured)
    halves = (None if a is None else (a + b) / 2 for a, b in zip(*seen, strict=True))
    middle = Seen(*halves)  # type: ignore[arg-type]
    losses = [preference_losses(now, o, held_at=middle) for now in seen]
    values = [pair_metrics(*both, scorer.half) for both in zip(losses, measures, strict=True)]
    rise = {RISE: values[0]["loss"] - values[1]["loss"]}
    return rise | {name: (first + values[1][name]) / 2 for name, first in values[0].items()}


def directions(
    here: Mapping[str, mx.array], config: TrainConfig, update: int
) -> dict[str, mx.array]:
    """UV^T for every matrix, and a plain random vector for what is none (DoRA's magnitudes)."""
    rank = config.forward_rank
    left, right = (
        mx.random.split(_key(config.seed, stream, count), len(here))
        for stream, count in ((0, update), (1, update // config.forward_interval))
    )
    moves = {}
    for i, (name, at) in enumerate(here.items()):
        if at.ndim == 1:
            moves[name] = math.sqrt(rank) * mx.random.normal(at.shape, key=left[i])
            continue
        *batch, rows, columns = at.shape  # experts come stacked
        u = mx.random.normal((*batch, rows, rank), key=left[i])
        v = mx.random.normal((*batch, columns, rank), key=right[i])
        moves[name] = u @ mx.swapaxes(v, -1, -2)
    return moves


def _key(seed: int, stream: int, count: int) -> mx.array:
    state = np.random.SeedSequence([seed, stream, count]).generate_state(1, np.uint64)
    return mx.random.key(int(state[0]))


GRADIENTS: dict[str, Gradient] = {"backward": backward, "forward": forward}


def _micro_batches(ground: Ground, indices: np.ndarray, own: Part) -> Iterator[ScoredPairs]:
    for some in micro_batches(indices[own.positions], ground.config.micro_batch_size):
        yield ground.data.take(some)
