"""mlx.optimizers by name, with mlx-lm's schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.optimizers import schedulers
from mlx.utils import tree_map

from fpo_mlx.config import TrainConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.model.trees import arrays_of, value_count

KINDS = {
    "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon,
    "sgd": optim.SGD, "adafactor": optim.Adafactor,
}  # fmt: skip
SCHEDULE = ("name", "arguments", "warmup", "warmup_init")


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """mlx.optimizers by name; the schedule is mlx-lm's block and counts updates.

    Raises: ConfigError for arguments that the optimizer or schedule does not take.
    """
    try:
        _refuse_unknown(config)
        trial, some = _make(config), {"some": mx.zeros((2, 2))}
        mx.eval(trial.apply_gradients(some, some))  # what only an update would find
        return _make(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ConfigError(
            f"lr_schedule / optimizer_config: {said}. Wanted lr_schedule: {{name: cosine_decay, "
            "arguments: [1e-5, 1000], warmup: 0}, optimizer_config: {adamw: {weight_decay: 0.1}}."
        ) from error


def _refuse_unknown(config: TrainConfig) -> None:
    """Raises: KeyError, TypeError for names that are none, of optimizers that are not used, too."""
    schedule = config.lr_schedule or {}
    for given, known in ((schedule, SCHEDULE), (config.optimizer_config, KINDS)):
        if unknown := {*map(str, given)} - {*known}:
            raise KeyError(f"unknown {', '.join(sorted(unknown))}, known are {', '.join(known)}")
    schedules = [name for name, f in vars(schedulers).items() if inspect.isfunction(f)]
    if schedule and schedule.get("name") not in schedules:
        raise KeyError(f"no schedule {schedule.get('name')}, known are {', '.join(schedules)}")
    for name, arguments in config.optimizer_config.items():
        KINDS[name](learning_rate=0.0, **dict(arguments or {}))


def _make(config: TrainConfig) -> optim.Optimizer:
    from mlx_lm.tuner.utils import build_schedule

    rate = build_schedule(config.lr_schedule) if config.lr_schedule else config.learning_rate
    arguments = dict(config.optimizer_config.get(config.optimizer) or {})
    if config.optimizer == "adafactor":  # its own default would ignore the learning rate
        arguments.setdefault("relative_step", False)
    return KINDS[config.optimizer](learning_rate=rate, **arguments)


def gradient_norm(gradient: Any) -> mx.array:
    """Root of the sum of all squares of a tree, a scalar."""
    return mx.sqrt(sum((mx.square(g).sum() for _, g in arrays_of(gradient)), mx.array(0.0)))


def make_update(optimizer: optim.Optimizer, max_norm: float) -> Callable[[Any, mx.array, Any], Any]:
    """A function (gradient, its norm, parameters) -> new parameters; the optimizer moves along.

    max_norm: what the gradient is scaled down to where its norm is larger; 0: never. All arrays
    in one compiled graph: some hundred small ones cost a third of what they do one by one.
    """

    @mx.compile
    def update(gradient, norm, parameters, state):
        optimizer.state = state
        optimizer.init(parameters)  # else it would look for the state of what has no gradient
        if max_norm:
            scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
            gradient = tree_map(lambda g: g * scale, gradient)
        return optimizer.apply_gradients(gradient, parameters), optimizer.state

    def apply(gradient: Any, norm: mx.array, parameters: Any) -> Any:
        before = optimizer.state
        try:
            parameters, optimizer.state = update(gradient, norm, parameters, before)
        except BaseException:
            optimizer.state = before  # not the arrays of an unfinished trace
            raise
        return parameters

    return apply


@mx.compile
def part_way(old: Any, new: Any, part: mx.array) -> Any:
    """A tree of parameters `part` of the way from old to new; one graph, as `make_update`."""
    return tree_map(lambda a, b: a + part.astype(a.dtype) * (b - a), old, new)


def trainable_count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed word counts as the values it holds."""
    trainable = sum(v.size for _, v in arrays_of(model.trainable_parameters()))
    every = (value_count(model, name, v) for name, v in arrays_of(model.parameters()))
    return trainable, sum(every)
