"""Adapters into weights: a folder that mlx_lm.load, transformers and llama.cpp's converter read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from fpo_mlx.errors import ConfigError
from fpo_mlx.model import adapters, card, gguf_file
from fpo_mlx.model.load import dequantize as dequantize_layers
from fpo_mlx.model.load import read_model
from fpo_mlx.model.rounding import (
    Kept,
    Raised,
    can_have,
    change_of,
    is_plain,
    is_rounded,
    kept_of,
    rounded_to,
    stored_bytes,
)
from fpo_mlx.model.trees import arrays_of, cast_floats, float_dtype, module_at
from fpo_mlx.records import DEFAULT_FORM, KEPT_BITS, FusedForm
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import TEMPLATE, model_template, own_template
from fpo_mlx.storage.outputs import BESIDE, CODE

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class FuseReport:
    """kept: of the adapters' change after rounding to fewer than 32 bits; template: which
    chat template the folder has ("" for the base's); raised: adapted layers of more bits than the
    base's; unreached: those that cannot have the bits wanted; below: those that have fewer than
    KEPT_BITS because fewer were asked for."""

    path: Path
    fused_layers: int
    quantized: bool
    gguf: Path | None = None
    kept: Kept | None = None
    template: str = ""
    raised: Raised | None = None
    unreached: int = 0
    below: int = 0


def fuse(
    model: str,
    adapter_path: Path,
    save_path: Path,
    form: FusedForm = DEFAULT_FORM,
    *,
    chat_template: Path | None = None,
    named: str | None = None,
    trust_remote_code: bool = False,
    check: Callable[[], object] = lambda: None,
) -> FuseReport:
    """Fuse, and write a model folder whole or not at all.

    A quantised base stays quantised, its layers without adapters as they were, unless
    `form.dequantize`; that adds the adapters to weights widened to float32 and stores `form.dtype`.
    chat_template: takes the place of the base's; default: the one beside the adapters, where
    training had another. named: the base's hub id, for the card. check: called just before the
    folder is put in its place (`files.atomic_folder`).

    Raises: ModelError for a model or adapter that cannot be read, ConfigError for an export that
    cannot be made; nothing is written then.
    """
    loaded = read_model(model, trust_remote_code=trust_remote_code)
    base, config, path = loaded.model, loaded.config, loaded.path
    export = _checked(form, path, config, base)
    report, gguf = _add(base, config, adapter_path, save_path, form, export), form.gguf_path
    template = _template(chat_template, adapter_path)
    with files.atomic_folder(save_path, check) as folder:
        _save(folder, path, base, config)
        card.put(folder, path, named)
        said = _put_template(folder, *template) if template else ""
        if gguf and export:
            gguf_file.write(folder / gguf, export, _saved(folder), folder)
    place = save_path / gguf if gguf else None
    return replace(report, gguf=place, template=said)


def _checked(
    form: FusedForm, path: Path, config: dict[str, Any], base: nn.Module
) -> gguf_file.Export | None:
    """What a GGUF needs, if one is wanted. Raises: ConfigError where the base has no such form."""
    _check_bits(config, form)
    if not form.gguf_path:
        return None
    _check_gguf(form.gguf_path, "quantization" in config and not form.dequantize)
    args = getattr(base, "args", None)
    return gguf_file.prepare(path, config, args, gguf_file.file_type(form.dtype))


def _add(
    base: nn.Module,
    config: dict[str, Any],
    adapter_path: Path,
    save_path: Path,
    form: FusedForm,
    export: gguf_file.Export | None,
) -> FuseReport:
    """Put the adapters into `base`, and its new form into `config`; what became of them."""
    own = float_dtype(base)
    if form.dequantize:
        dequantize_layers(base)
        _refuse_packed(base)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        cast_floats(base, mx.float32)
    if export:
        gguf_file.their_names(export, dict(arrays_of(base.parameters())))
    adapters.load(base, adapter_path, scale=form.scale)
    stored = DTYPES[form.dtype] if form.dtype else own if form.dequantize else None
    least = form.least_bits
    low, unreached = below(base, least or KEPT_BITS)
    left = len(below(base, KEPT_BITS)[0]) if (least or 0) < KEPT_BITS else 0
    before = sum(stored_bytes(module_at(base, name)["linear"], stored) for name in low)
    count, kept = fuse_layers(
        base, config, dequantize=form.dequantize, keep_bits=least, stored=stored
    )
    if stored is not None:
        cast_floats(base, stored)
        _say_type(config, stored)
    report = FuseReport(save_path, count, "quantization" in config, kept=kept, below=left)
    if least is None:
        return report
    more = sum(stored_bytes(module_at(base, name), stored) for name in low) - before
    raised = Raised(len(low), least, tuple(sorted(set(low.values()))), more) if low else None
    return replace(report, raised=raised, unreached=unreached)


def _say_type(config: dict[str, Any], stored: mx.Dtype) -> None:
    """Where config.json names a float type: readers round the weights to the one it says."""
    name = next(name for name, dtype in DTYPES.items() if dtype == stored)
    for part in (config, config.get("text_config") or {}):
        for key in {"torch_dtype", "dtype"} & set(part):
            part[key] = name


def below(model: nn.Module, bits: int) -> tuple[dict[str, int], int]:
    """Adapted layers that are quantised to fewer bits: those that can have so many, by name with
    the bits of their base, and how many cannot (embeddings, blocks of experts)."""
    can, cannot = {}, 0
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        base = module["linear"] if "linear" in module else module["embedding"]
        if is_plain(module) and can_have(base, bits):
            can[name] = base.bits
        else:
            cannot += getattr(base, "bits", bits) < bits
    return can, cannot


def _save(folder: Path, base: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Weights and configuration as mlx-lm writes them, everything else as the base has it.

    Each file's weights are let go as it is written: `model` has none afterwards.
    """
    from mlx_lm import utils

    utils.save_model(folder, model, donate_model=True)
    towers = "vision_tower" in getattr(model, "model", {})
    utils.save_config(config, folder / "config.json", keep_vision_config=towers)
    card.copy_beside(folder, base, (*BESIDE, CODE))


def _saved(folder: Path) -> dict[str, mx.array]:
    """The weights that were written, each read when it is looked at."""
    found: dict[str, mx.array] = {}
    for file in files.listed(folder, "model*.safetensors"):
        found |= cast("dict[str, mx.array]", mx.load(str(file)))
    return found


def _template(given: Path | None, adapter_path: Path) -> tuple[str, str] | None:
    """(text, where it is from) of the chat template that training had; None for the base's own."""
    place = given or own_template(adapter_path)
    if place is None:
        return None
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: the chat template cannot be read: {error}.") from error
    return text, "--chat-template" if given else "training"


def _put_template(folder: Path, text: str, source: str) -> str:
    """Give the folder this template, in each place that a reader looks at; what to say of it."""
    if model_template(folder) == text:
        return ""
    (folder / TEMPLATE).write_text(text, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    settings = files.parse_json(config.read_bytes()) if config.is_file() else {}
    if settings.get("chat_template") is not None:  # some readers look there first
        settings["chat_template"] = text
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    return f"the chat template of {source}"


def fuse_layers(
    model: nn.Module,
    config: dict[str, Any],
    *,
    dequantize: bool = False,
    keep_bits: int | None = None,
    stored: mx.Dtype | None = None,
) -> tuple[int, Kept | None]:
    """Replace every adapted layer by one of base + adapter, of its types.

    stored: of the floats; default: those of the layer's base, or else of the model.
    Returns: how many there were, and what rounding left of their change (None without rounding).
    keep_bits is written into `config` for the layers concerned.
    """
    # by name: a list of the modules would hold each layer's float32 base until the last
    names = [name for name, module in model.named_modules() if "lora_a" in module]
    sums = [_fuse_one(model, name, config, dequantize, keep_bits, stored) for name in names]
    return len(names), Kept.of([one for one in sums if one is not None])


def _fuse_one(
    model: nn.Module,
    name: str,
    config: dict[str, Any],
    dequantize: bool,
    keep_bits: int | None,
    stored: mx.Dtype | None,
) -> tuple[float, float, float, int] | None:
    """Put one fused layer in the adapted one's place; what `kept_of` says, where it is rounded."""
    module = module_at(model, name)
    base: nn.Module = module["linear"] if "linear" in module else module["embedding"]
    change, kept = change_of(module), None
    if change is None:  # an embedding: mlx-lm's own way
        new: nn.Module = module.fuse(dequantize=dequantize)
    else:
        new = rounded_to(base, change, keep_bits)
        if isinstance(new, nn.QuantizedLinear) and new.bits != base.bits:
            config["quantization"][name] = {"group_size": new.group_size, "bits": new.bits}
    new = _typed_as(base, new, stored, model)
    if change is not None and is_rounded(new):
        kept = kept_of(base, change, new)
    mx.eval(new.parameters())  # it keeps nothing of the base from now on
    model.update_modules(tree_unflatten([(name, new)]))
    return kept


def _typed_as(
    base: nn.Module, fused: nn.Module, stored: mx.Dtype | None, model: nn.Module
) -> nn.Module:
    """The fused layer in that float type, or its base's: the sum is made in float32."""
    arrays = (array for _, array in arrays_of(base.parameters()))
    types = {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)}
    if stored is not None:
        types = {stored}
    elif not types:  # nvfp4's and mxfp4's scales are integers
        types = {float_dtype(model)}
    if len(types) == 1:
        cast_floats(fused, types.pop())
    return fused


def _check_bits(config: dict[str, Any], form: FusedForm) -> None:
    """Raises: ConfigError where the bits that were asked for are none of a model of these bits."""
    if form.keep_bits is None:
        return
    if form.dequantize:
        raise ConfigError("--keep-bits and --dequantize exclude each other; give one.")
    if form.keep_bits == "base":
        return
    bits = (config.get("quantization") or {}).get("bits")
    if bits is None:
        raise ConfigError(
            f"--keep-bits {form.keep_bits}: this model is not quantised. Leave it out."
        )
    if form.keep_bits <= bits:
        raise ConfigError(f"--keep-bits {form.keep_bits}: the model has {bits} bits. Wanted more.")


def _refuse_packed(base: nn.Module) -> None:
    """Raises: ConfigError where a layer's weights are still packed: nothing would say so."""
    for name, module in base.named_modules():
        weight = module.get("weight")
        packed = weight is not None and not mx.issubdtype(weight.dtype, mx.floating)
        if packed or hasattr(module, "bits"):
            raise ConfigError(
                f"--dequantize: {name} is a {type(module).__name__}, which cannot be made a layer "
                "of floats here. Leave --dequantize out."
            )


def _check_gguf(name: str, quantized: bool) -> None:
    if Path(name).name != name or not name.endswith(".gguf"):
        raise ConfigError(
            f"--gguf-path {name}: wanted a bare name that ends in .gguf; the file is written into "
            "--save-path."
        )
    if quantized:
        raise ConfigError("--export-gguf: a GGUF is written of float weights; add --dequantize.")
