"""A Hugging Face or MLX folder, with or without an mlx-lm adapter -> a transformers model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.reference.torch_backend.mlx_folder import (
    is_mlx_folder,
    read_config,
    read_mlx_weights,
    stored_dtype,
)
from fpo_mlx.storage.adapter_files import AdapterFile, read_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# transformers' name for what mlx-lm calls otherwise
RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("model.h.", "gpt_neox.layers."),
    ("model.", "model.language_model."),
)
IGNORED = ("vision", "visual", "multi_modal", "image", "audio")  # towers that text never enters


def choose_device(name: str | None) -> torch.device:
    """The device of this name; None: CUDA, else Metal, else the CPU. Raises ConfigError."""
    if name is None and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's: a GPU for each process
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}). "
            "Wanted cpu, cuda, cuda:N or mps, as this machine and its PyTorch have them."
        ) from error
    return device


def choose_dtype(name: str | None, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype of this name; None: float32 on a CPU, else what the folder stores."""
    if name is None:
        return torch.float32 if device.type == "cpu" else stored_dtype(folder)
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: wanted one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(
    folder: Path,
    adapter: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, tuple[str, ...]]:
    """The frozen model with its adapter, and notes on how it was read.

    Raises ModelError when the folder or the adapter cannot be read, or do not fit.
    """
    config = read_config(folder)
    notes: list[str] = []
    try:
        with _no_bars():
            model, loading = _load(folder, config, dtype, trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: transformers cannot load this model: {error}") from error
    if "quantization" in config:
        notes.append(f"{folder.name}: quantised weights were dequantised to {dtype}")
    _check_complete(folder, loading)
    if adapter is not None:
        count, where = add_adapter(model, adapter), "merged into the weights"
        if dtype != torch.float32:
            where = "kept in float32 beside the weights of linear layers, merged into others"
        notes.append(f"{adapter.name}: {count} adapted layers were {where}")
    model.eval().requires_grad_(False)
    return model.to(device), tuple(notes)


def _load(folder: Path, config: dict, dtype: torch.dtype, trust: bool) -> tuple[Any, dict]:
    if is_mlx_folder(folder, config):
        return _from_mlx(folder, config, dtype)
    return _from_hugging_face(folder, config, dtype, trust)


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar while it loads; what is shown is for the command line to say."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_hugging_face(
    folder: Path, config: dict, dtype: torch.dtype, trust: bool
) -> tuple[Any, dict]:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **_attention(config)
    )


def _from_mlx(folder: Path, config: dict, dtype: torch.dtype) -> tuple[Any, dict]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    own = AutoConfig.for_model(**plain)
    weights = read_mlx_weights(folder, config, dtype)
    loader: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]
    return loader.from_pretrained(
        None,
        config=own,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
        **_attention(config),
    )


def _attention(config: Mapping[str, Any]) -> dict[str, str]:
    """Gemma 2 caps its attention's logits; of what transformers has, the plain one does so."""
    text = config.get("text_config") or config
    return {"attn_implementation": "eager"} if text.get("attn_logit_softcapping") else {}


def _check_complete(folder: Path, loading: dict[str, Any]) -> None:
    faults = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [key if isinstance(key, str) else key[0] for key in loading.get(what, ())]
        names = [n for n in names if not any(part in n for part in IGNORED) and "rotary" not in n]
        if names:
            faults.append(f"{what.replace('_', ' ')}: {', '.join(sorted(names)[:4])}")
    if faults:
        raise ModelError(
            f"{folder}: the weights are not those of the model that config.json describes "
            f"({'; '.join(faults)}). Use --backend mlx, or the Hugging Face original."
        )


def add_adapter(model: nn.Module, folder: Path) -> int:
    """Add an adapter of mlx-lm or PEFT to the model, in float32; the number of layers.

    LoRA: W + scale (A B)^T. DoRA: each row of that divided by its norm and multiplied by m.
    It goes into weights of float32, and beside a linear layer's of fewer bits, which would round a
    small change away.
    Raises ModelError when a layer is absent, of another kind or of another shape.
    """
    found = read_adapter(folder)
    try:
        tensors = load_file(found.weights)
    except Exception as error:  # safetensors has errors of its own
        raise ModelError(f"{found.weights} cannot be read: {error}") from error
    if found.peft:
        tensors, scales = _from_peft(found, tensors)
    else:
        scales = {}
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    for path in paths:
        parts = {name: tensors.get(f"{path}.{name}") for name in ("lora_a", "lora_b", "m")}
        a, b, m = parts.values()
        if a is None or b is None or (found.kind == "dora") != (m is not None):
            raise ModelError(
                f"{folder}: {path} lacks a part of a {found.kind} layer. Save it again."
            )
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ModelError(
                f"{folder}: {path} has factors of shapes {list(a.shape)} and {list(b.shape)}, not "
                "[in, rank] and [rank, out] of one layer. Fuse the adapter first, or --backend mlx."
            )
        module, b = _module_at(model, path), scales.get(path, found.scale) * b.float()
        change = _change(folder, path, module, a.float() @ b)
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32:
            _put_beside(module, a.float(), b, change, m)
        elif module is not None:
            _merge(module, change, m)
    return len(paths)


def _from_peft(
    found: AdapterFile, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """PEFT's tensors by mlx-lm's names, factors transposed; and the scale of each layer."""
    out = {
        f"{path}.{leaf}": tensors[name].T if leaf != "m" else tensors[name].reshape(-1)
        for path, layer in found.layers.items()
        for leaf, name in layer.parts.items()
    }
    return out, {path: layer.scale for path, layer in found.layers.items()}


def _change(folder: Path, path: str, module: Any, product: torch.Tensor) -> torch.Tensor:
    """Of the layer's weight, as it lies. product: A B. Raises ModelError where it does not fit."""
    change = product.T if isinstance(module, nn.Linear) else product
    if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.shape != change.shape:
        shape = list(getattr(getattr(module, "weight", None), "shape", ()))
        found = f"{type(module).__name__} of shape {shape}" if module is not None else "nothing"
        raise ModelError(
            f"{folder}: {path} is for a layer of shape {list(change.shape)}, and the model has "
            f"{found} there. Name the model that "
            "the adapter was trained on, or fuse the adapter first."
        )
    return change


def _merge(module: Any, change: torch.Tensor, m: torch.Tensor | None) -> None:
    with torch.no_grad():
        merged = module.weight.float() + change
        if m is not None:
            merged *= (m.float() / merged.norm(dim=1))[:, None]
        module.weight.copy_(merged)


def _put_beside(
    module: nn.Linear,
    a: torch.Tensor,
    b: torch.Tensor,
    change: torch.Tensor,
    m: torch.Tensor | None,
) -> None:
    """What mlx-lm's own layers compute, rounded where they round."""
    module.register_buffer("lora_a", a, persistent=False)  # goes where the model goes
    module.register_buffer("lora_b", b, persistent=False)
    if m is not None:
        rows = (m.float() / (module.weight.float() + change).norm(dim=1)).to(module.weight.dtype)
        module.register_buffer("dora_rows", rows, persistent=False)
    module.register_forward_hook(_adapted)


def _adapted(module: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    x = given[0]
    change = ((x.float() @ module.lora_a) @ module.lora_b).to(out.dtype)
    rows = getattr(module, "dora_rows", None)
    if rows is None:
        return out + change
    plain = out if module.bias is None else nn.functional.linear(x, module.weight)
    adapted = rows * (plain + change)
    return adapted if module.bias is None else adapted + module.bias


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    for candidate in _spellings(path):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _spellings(path: str) -> Iterator[str]:
    yield path
    for theirs, ours in RENAMED:
        if path.startswith(theirs):
            yield ours + path.removeprefix(theirs)
