"""MLX's trees and files with the types that they have here; its stubs say less."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from fpo_mlx.machine.upstream import leaning_on

ADAPTED = ("lora_a", "lora_b", "m")  # an adapter's own arrays
SCALE = "global_scale"  # of nvfp4 experts; MLX reads it in float32 only


def arrays_of(tree: Any) -> list[tuple[str, mx.array]]:
    """(path, array) of every leaf of a module's parameters or an optimizer's state."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def leaves_of(tree: Any) -> list[Any]:
    """Everything in nested tuples, lists and dictionaries, in the order of `tree_map`."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, first to last, as mlx-lm's models name them."""
    with leaning_on("mlx-lm", "`layers`, a model's list of blocks"):
        return cast("list[nn.Module]", model.layers)


def float_dtype(model: nn.Module) -> mx.Dtype:
    """Of the first floating-point parameter (or scale): what the model was published in.

    Adapters are float32 whatever the model is.
    """
    named, other = arrays_of(model.parameters()), (*ADAPTED, SCALE)
    kinds = (array.dtype for name, array in named if name.split(".")[-1] not in other)
    return next(kind for kind in kinds if mx.issubdtype(kind, mx.floating))


def module_at(root: Any, path: str) -> Any:
    """The module of that path, as `named_modules` has it; "" for `root` itself."""
    for part in path.split(".") if path else ():
        root = root[int(part)] if isinstance(root, list) else root[part]
    return root


def value_count(root: Any, name: str, array: mx.array) -> int:
    """Values that a stored array stands for; scales and biases of a packing stand for none."""
    path, _, leaf = name.rpartition(".")
    owner = module_at(root, path)
    if not hasattr(owner, "bits"):
        return array.size
    if leaf in ("scales", "biases"):
        return 0
    return array.size * 32 // owner.bits if array.dtype == mx.uint32 else array.size


def input_width(layer: Any) -> int:
    """Of the vectors that a linear layer reads, whatever it stores, adapted or not."""
    plain = layer.get("linear", layer)
    if "scales" in plain:
        return plain.scales.shape[-1] * plain.group_size
    return plain.weight.shape[-1]


def cast_floats(model: nn.Module, dtype: mx.Dtype) -> None:
    """Turn all floating-point parameters into `dtype`; packed integers stay, and nvfp4's scales."""

    def cast_one(path: str, array: mx.array) -> mx.array:
        stays = path.endswith(SCALE) or not mx.issubdtype(array.dtype, mx.floating)
        return array if stays else array.astype(dtype)

    model.update(tree_map_with_path(cast_one, model.parameters()))


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and metadata of a safetensors file. Raises RuntimeError or ValueError if damaged."""
    read = mx.load(str(path), return_metadata=True)
    return cast("tuple[dict[str, mx.array], dict[str, str]]", read)
