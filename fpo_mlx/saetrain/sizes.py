"""What the settings of an SAE leave open, settled from the model, the width and the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpo_mlx.config import SaeTrainConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.storage.hub import size_in


@dataclass(frozen=True)
class Sizes:
    """What a run needs of numbers, settled."""

    layer: int
    width: int
    k: int
    aux_k: int


def sizes(settings: SaeTrainConfig, model: Mapping[str, Any], hidden: int) -> Sizes:
    """Block, width and k from the model alone.

    The block lies at nine tenths of the depth: FPO's authors found late blocks best (2411.07618,
    section 5), and adapters are put below it. Width is the power of two at or below 8 hidden
    sizes.

    Raises ConfigError for what does not fit together.
    """
    n = size_in(model, "num_hidden_layers")
    layer = n - 1 - max(1, round(n / 15)) if settings.layer is None else settings.layer
    if not 0 <= layer < n:
        raise ConfigError(f"--layer {layer}: the model's blocks are 0 to {n - 1}.")
    width = settings.width or 1 << (8 * hidden).bit_length() - 1
    k = settings.k or min(32 if hidden < 1024 else 64, width // 4)
    if k >= width:
        raise ConfigError(f"--k {k}: wanted fewer than --width {width}.")
    if settings.matryoshka and width % 8:
        raise ConfigError(f"--matryoshka: wanted a --width that 8 divides, found {width}.")
    return Sizes(layer, width, k, min(settings.aux_k or hidden // 2, width))


def learning_rate(settings: SaeTrainConfig, width: int) -> float:
    """3e-3 up to 4096 features, then falling with the root of the width (2406.04093, B.3)."""
    return settings.learning_rate or 3e-3 * min(1.0, (4096 / width) ** 0.5)


def prefixes(settings: SaeTrainConfig, width: int) -> tuple[int, ...]:
    """Ends of the nested prefixes: an eighth, a quarter, half, all."""
    return (width // 8, width // 4, width // 2, width) if settings.matryoshka else (width,)


def steps_in_time(
    seconds: float, *, per_row: float, per_token: float, available: int, reused: bool
) -> int:
    """Tokens that can be trained on in `seconds`.

    per_row: seconds for one activation; per_token: seconds of training a token; available: rows
    of one pass; reused: whether a second pass needs no new activations.
    """
    both = seconds / (per_row + per_token)
    if both <= available or not reused:
        return int(both)
    return int(available + (seconds - available * (per_row + per_token)) / per_token)
