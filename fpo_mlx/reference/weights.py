"""Fingerprints of a model's and an adapter's content: equal for a copy, however it is sharded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fpo_mlx.errors import ModelError
from fpo_mlx.storage.adapter_files import deciding, is_peft, read_adapter
from fpo_mlx.storage.files import listed, read_object
from fpo_mlx.storage.tensors import read_header

CHUNK = 1 << 22  # bytes read at a time
# fields of config.json that no logit depends on, or that repeat another field
COSMETIC = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
        "problem_type",
        "chunk_size_feed_forward",
    ]
)


class _Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int  # offset in the file
    size: int  # bytes


def model_fingerprint(folder: str | Path) -> str:
    """sha256 over config.json without its cosmetic keys and all tensors of a model folder.

    Tensors count by name, dtype, shape and bytes, in the order of their names, so the way in which
    they are split into files does not matter. Raises ModelError when the folder cannot be read.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    if "quantization" not in config and "quantization_config" in config:
        config = config | {"quantization": config["quantization_config"]}
    deciding = {k: v for k, v in config.items() if k not in COSMETIC and v is not None}
    files = listed(folder, "model*.safetensors") or [
        p for p in listed(folder, "*.safetensors") if not p.name.endswith("adapters.safetensors")
    ]
    return _digest(folder, deciding, files)


def adapter_fingerprint(folder: str | Path | None) -> str:
    """sha256 over the tensors, kind and scale of mlx-lm's or PEFT's adapter; "none" for none."""
    if folder is None:
        return "none"
    folder = Path(folder)
    config = _read_json(folder / "adapter_config.json")
    if is_peft(config):
        found = read_adapter(folder)
        return _digest(folder, deciding(found), [found.weights])
    lora = config.get("lora_parameters") or {}
    kind_and_scale = {"kind": config.get("fine_tune_type", "lora"), "scale": lora.get("scale")}
    path = folder / "adapters.safetensors"
    return _digest(folder, kind_and_scale, [path] if path.exists() else [])


def _digest(folder: Path, deciding: dict[str, Any], files: list[Path]) -> str:
    if not files:
        raise ModelError(
            f"{folder} holds no safetensors weights. Wanted a model or adapter folder as "
            "Hugging Face, mlx_lm or fpo-mlx write it; convert other formats first."
        )
    tensors = sorted(tensor for path in files for tensor in _tensors(path))
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        for tensor, content in zip(tensors, pool.map(_content, tensors), strict=True):
            digest.update(f"\n{tensor.name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[_Tensor]:
    try:
        found = read_header(path).tensors
        end = max(tensor.start + tensor.size for tensor in found.values())
        if path.stat().st_size != end:
            raise ValueError(f"{path.stat().st_size} bytes instead of {end}")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is no whole safetensors file ({error}). Download or copy it again."
        ) from error
    for name, one in found.items():
        yield _Tensor(name, one.dtype, one.shape, path, one.start, one.size)


def _content(tensor: _Tensor) -> bytes:
    digest = hashlib.sha256()
    with open(tensor.path, "rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left > 0:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ModelError(f"{tensor.path} ends within {tensor.name}. Copy it again.")
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). Wanted a model folder with config.json, or an "
            "adapter folder with adapter_config.json."
        ) from error
