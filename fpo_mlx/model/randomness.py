"""MLX's global random state as one number, so that dropout can be repeated."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def position() -> int:
    """Where the global generator stands; evaluates its key."""
    high, low = mx.random.state[0].tolist()  # type: ignore[misc]
    return (high << 32) | low


def go_to(place: int) -> None:
    """Back to (or on to) a place that `position` named."""
    mx.random.seed(place)


def go_to_own(*numbers: int) -> None:
    """To a place of its own for every choice of numbers, whatever was drawn before."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    go_to(int(state[0]))


def drops(module: nn.Module, *, now: bool = True) -> bool:
    """Whether a call of this module draws random numbers; now: as it is, not if it were trained."""
    return any(
        isinstance(part, nn.Dropout) and (part.training or not now) and part._p_1 < 1.0
        for part in module.modules()
    )
