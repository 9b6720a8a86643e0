"""Any model folder or hub id that mlx-lm loads -> model, config, folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from fpo_mlx.errors import ModelError
from fpo_mlx.machine import device
from fpo_mlx.model.rounding import plain_weight
from fpo_mlx.model.trees import cast_floats, float_dtype
from fpo_mlx.storage.hub import resolve_model


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model. `notes` says what was done to it on the way in."""

    model: nn.Module
    config: dict[str, Any]
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Of its values: that of the first floating-point parameter."""
        return str(float_dtype(self.model)).split(".")[-1]


def read_model(spec: str | Path, *, trust_remote_code: bool = False) -> LoadedModel:
    """The model as it is stored, its weights not yet read.

    Raises: ModelError when the folder cannot be read as a model.
    """
    from mlx_lm import utils

    path = resolve_model(spec)
    try:
        model, config = utils.load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path}: mlx-lm cannot load this model: {error}") from error
    return LoadedModel(model, config, path)


def load_model(spec: str | Path, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load, freeze, and on a CPU turn the weights into float32.

    Quantised matmul on MLX's CPU is some 30 times slower than float32 through a BLAS, and half
    precision has no fast path there either; the numbers stay those of the stored weights.

    Raises: ModelError when the folder cannot be read as a model.
    """
    loaded = read_model(spec, trust_remote_code=trust_remote_code)
    model = loaded.model
    notes: list[str] = []
    if device.here().widen:
        count = dequantize(model)
        if count:
            notes.append(f"CPU: {count} quantised layers were dequantised to float32 at load")
        cast_floats(model, mx.float32)
    device.bound_cache()
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return replace(loaded, notes=tuple(notes))


def dequantize(model: nn.Module) -> int:
    """Replace quantised layers by float32 layers of the same values; how many there were."""
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    plain = {
        nn.QuantizedLinear: nn.Linear,
        nn.QuantizedEmbedding: nn.Embedding,
        QuantizedSwitchLinear: SwitchLinear,
        QuantizedMultiLinear: MultiLinear,  # a matrix a head, of latent attention
    }
    replaced = []
    for name, module in model.named_modules():
        cls = plain.get(type(module))
        if cls is None:
            continue
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight = plain_weight(module)
        if "bias" in module:
            layer.bias = module.bias
        replaced.append((name, layer))
    if replaced:
        model.update_modules(tree_unflatten(replaced))
    return len(replaced)
