"""Weights of a folder that mlx-lm wrote, as the torch tensors that transformers wants. No mlx."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fpo_mlx.errors import ModelError
from fpo_mlx.storage.files import listed, read_object

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)
STACKED = re.compile(r"(.+)\.switch_mlp\.(gate|up|down)_proj\.weight")
MIXTRAL_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}


def is_mlx_folder(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the weights are laid out and named by mlx-lm."""
    if "quantization" in config:
        return True
    for path in listed(folder, "model*.safetensors")[:1]:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == "mlx"
    return False


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """MLX's packing: a little-endian stream of `bits`-wide numbers. uint32 [.., W] -> int64."""
    stream = packed.contiguous().view(torch.uint8)  # [.., 4 W]
    span = {2: 1, 4: 1, 8: 1, 3: 3, 6: 3, 5: 5}[bits]  # bytes after which numbers start anew
    groups = stream.reshape(*packed.shape[:-1], -1, span).to(torch.int64)
    words = sum(groups[..., i] << (8 * i) for i in range(span))  # [.., 4 W / span]
    assert isinstance(words, torch.Tensor)  # span >= 1
    shifts = torch.arange(0, 8 * span, bits)
    numbers = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(*packed.shape[:-1], -1)


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, *, bits: int, group_size: int
) -> torch.Tensor:
    """scale * q + bias in float32. packed: uint32 [.., in * bits / 32] -> [.., in].

    scales, biases: [.., in / group_size]. Equals mx.dequantize of scales widened to float32.
    """
    numbers = unpack(packed, bits).to(torch.float32)
    groups = numbers.reshape(*numbers.shape[:-1], -1, group_size)  # [.., in / g, g]
    weights = scales.float()[..., None] * groups + biases.float()[..., None]
    return weights.reshape(numbers.shape)


def read_mlx_weights(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> dict:
    """The state dict of an MLX folder under transformers' checkpoint names.

    dtype: of the result; None leaves each tensor the dtype of its stored values or scales.
    Raises ModelError on a quantisation other than affine, or tensors that do not fit it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in listed(folder, "model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors |= {name: file.get_tensor(name) for name in names}
    if not tensors:
        raise ModelError(f"{folder} holds no model*.safetensors. Wanted a folder of mlx_lm.")
    weights = {}
    for name in list(tensors):
        if name.endswith((".scales", ".biases")) and _quantised(name, tensors):
            continue
        module = name.removesuffix(".weight")
        weight = tensors[name]
        stored = weight.dtype
        if name.endswith(".weight") and f"{module}.scales" in tensors:
            stored = tensors[f"{module}.scales"].dtype
            weight = _dequantize_module(folder, module, tensors, config.get("quantization") or {})
        for own_name, part in _checkpoint_names(name, weight):
            weights[own_name] = part.to(dtype or stored) if part.is_floating_point() else part
    return weights


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating dtype of the largest number of a model folder's tensors (scales count)."""
    counts: dict[str, int] = {}
    for path in listed(folder, "model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                dtype = file.get_slice(name).get_dtype()
                counts[dtype] = counts.get(dtype, 0) + 1
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    floating = {name: count for name, count in counts.items() if name in known}
    return known[max(floating, key=lambda name: floating[name])] if floating else torch.float32


def _quantised(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    module = name.rpartition(".")[0]
    return tensors.get(f"{module}.weight", torch.empty(0)).dtype == torch.uint32


def _dequantize_module(
    folder: Path, module: str, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> torch.Tensor:
    own = settings.get(module)
    chosen = {**settings, **own} if isinstance(own, dict) else settings
    mode, bits, group = chosen.get("mode", "affine"), chosen.get("bits"), chosen.get("group_size")
    if mode != "affine" or bits not in BITS or group not in GROUP_SIZES:
        raise ModelError(
            f"{folder / 'config.json'}: {module} is quantised as {mode} with {bits} bits in groups "
            f"of {group}; the torch backend reads affine with {', '.join(map(str, BITS))} bits in "
            "groups of 32, 64 or 128. Use --backend mlx, or an affine conversion of the model."
        )
    packed, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
    if packed.shape[-1] * 32 != scales.shape[-1] * group * bits:
        raise ModelError(
            f"{folder}: {module} has {packed.shape[-1]} packed words and {scales.shape[-1]} groups "
            f"a row, which do not make {bits} bits in groups of {group}. Convert the model again."
        )
    biases = tensors[f"{module}.biases"]
    return dequantize(packed, scales, biases, bits=bits, group_size=group)


def _checkpoint_names(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """mlx-lm stacks the experts of a block into one tensor; checkpoints hold one for each."""
    match = STACKED.fullmatch(name)
    if match is None:
        yield name, weight
        return
    block, which = match.groups()
    own = MIXTRAL_NAMES[which] if block.endswith("block_sparse_moe") else f"{which}_proj"
    for number, part in enumerate(weight):
        yield f"{block}.experts.{number}.{own}.weight", part


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands there. Raises ModelError when it cannot be read."""
    path = folder / "config.json"
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). Wanted the folder of a Hugging Face or MLX model."
        ) from error
