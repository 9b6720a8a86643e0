"""Adapters into weights: a folder that mlx_lm.load, mlx_lm.generate and LM Studio read."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from fpo_mlx.errors import ConfigError
from fpo_mlx.model import adapters
from fpo_mlx.model.load import dequantize as dequantize_layers
from fpo_mlx.model.load import read_model
from fpo_mlx.model.trees import arrays_of, cast_floats, float_dtype
from fpo_mlx.storage import files

GGUF_TYPES = ("llama", "mistral", "mixtral")  # all that mlx-lm exports
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class FuseReport:
    path: Path
    fused_layers: int
    quantized: bool
    gguf: Path | None = None
    uploaded: str | None = None


def fuse(
    model: str,
    adapter_path: Path,
    save_path: Path,
    *,
    dequantize: bool = False,
    dtype: str | None = None,
    gguf_path: str | None = None,
    upload_repo: str | None = None,
    trust_remote_code: bool = False,
    scale: float = 1.0,
) -> FuseReport:
    """Fuse, and write a model folder whole or not at all.

    A quantised base stays quantised, layer by layer as it was, unless `dequantize`; that adds the
    adapters to weights widened to float32 and stores `dtype` (default: the base's own).
    scale: part of the adapter's change that is taken (`adapters.fill`).

    Raises: ModelError for a model or adapter that cannot be read, ConfigError for an export that
    mlx-lm does not offer; nothing is written then.
    """
    from mlx_lm import utils

    _check_place(save_path)
    loaded = read_model(model, trust_remote_code=trust_remote_code)
    base, config, path = loaded.model, loaded.config, loaded.path
    if gguf_path and config["model_type"] not in GGUF_TYPES:
        raise ConfigError(
            f"--export-gguf: mlx-lm exports {', '.join(GGUF_TYPES)} only, and this is a "
            f"{config['model_type']}. Convert the fused folder with llama.cpp's converter."
        )
    if gguf_path and "quantization" in config and not dequantize:
        raise ConfigError("--export-gguf: mlx-lm exports float weights only; add --dequantize.")
    own = float_dtype(base)
    if dequantize:
        dequantize_layers(base)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        cast_floats(base, mx.float32)
    adapters.load(base, adapter_path, scale=scale)
    count = fuse_layers(base, dequantize=dequantize)
    if dequantize or dtype:
        cast_floats(base, DTYPES[dtype] if dtype else own)
    tokenizer = utils.load_tokenizer(
        path,
        {"trust_remote_code": trust_remote_code},  # without it transformers would ask
        eos_token_ids=config.get("eos_token_id"),
    )
    with files.atomic_folder(save_path) as folder:
        utils.save(folder, str(path), base, tokenizer, config, donate_model=False)
        if gguf_path:
            _export_gguf(folder, base, config, folder / gguf_path)
    if upload_repo:
        utils.upload_to_hub(str(save_path), upload_repo)
    gguf = save_path / gguf_path if gguf_path else None
    return FuseReport(save_path, count, "quantization" in config, gguf, upload_repo)


def fuse_layers(model: nn.Module, *, dequantize: bool = False) -> int:
    """Replace every adapted layer by one of base + adapter, of its types; how many there were."""
    fused = [
        (name, _typed_as(module, module.fuse(dequantize=dequantize)))
        for name, module in model.named_modules()
        if "lora_a" in module
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    return len(fused)


def _typed_as(adapted: nn.Module, fused: nn.Module) -> nn.Module:
    """The fused layer in its base's float type: DoRA's magnitudes are float32, and so its sum."""
    base: nn.Module = adapted["linear"] if "linear" in adapted else adapted["embedding"]
    types = {
        v.dtype for _, v in arrays_of(base.parameters()) if mx.issubdtype(v.dtype, mx.floating)
    }
    if len(types) == 1:  # mxfp4 has none: its scales are integers
        cast_floats(fused, types.pop())
    return fused


def _export_gguf(folder: Path, model: nn.Module, config: dict[str, Any], path: Path) -> None:
    from mlx_lm.gguf import convert_to_gguf

    with redirect_stdout(sys.stderr):  # it prints
        convert_to_gguf(folder, dict(arrays_of(model.parameters())), config, str(path))


def _check_place(path: Path) -> None:
    """A folder that is replaced must be a model's: nobody loses other files to a wrong name."""
    if files.listed(path) and not (path / "config.json").is_file():
        raise ConfigError(
            f"--save-path {path}: it holds files and is no model folder, and fusing would replace "
            "it. Name a new folder, or an older fused one."
        )
