"""MLX's trees and files with the types that they have here; its stubs say less."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def arrays_of(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every leaf of a module's parameters or an optimizer's state."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, first to last, as mlx-lm's models name them."""
    return cast("list[nn.Module]", model.layers)


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and metadata of a safetensors file. Raises RuntimeError or ValueError if damaged."""
    read = mx.load(str(path), return_metadata=True)
    return cast("tuple[dict[str, mx.array], dict[str, str]]", read)
