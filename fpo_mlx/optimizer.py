"""mlx.optimizers by name, with mlx-lm's schedules."""

from __future__ import annotations

import mlx.nn as nn
import mlx.optimizers as optim

from fpo_mlx.config import TrainConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.model.trees import arrays_of


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """mlx.optimizers by name; the schedule is mlx-lm's block and counts updates.

    Raises: ConfigError for arguments that the optimizer or schedule does not take.
    """
    from mlx_lm.tuner.utils import build_schedule

    kinds = {
        "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon,
        "sgd": optim.SGD, "adafactor": optim.Adafactor,
    }  # fmt: skip
    rate = config.learning_rate
    try:
        if config.lr_schedule:
            rate = build_schedule(config.lr_schedule)
        arguments = dict(config.optimizer_config.get(config.optimizer, {}))
        if config.optimizer == "adafactor":  # its own default would ignore the learning rate
            arguments.setdefault("relative_step", False)
        return kinds[config.optimizer](learning_rate=rate, **arguments)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"lr_schedule / optimizer_config: {error}. Wanted lr_schedule: {{name: cosine_decay, "
            "arguments: [1e-5, 1000], warmup: 0}, optimizer_config: {adamw: {weight_decay: 0.1}}."
        ) from error


def trainable_count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    trainable = sum(v.size for _, v in arrays_of(model.trainable_parameters()))
    return trainable, sum(v.size for _, v in arrays_of(model.parameters()))
