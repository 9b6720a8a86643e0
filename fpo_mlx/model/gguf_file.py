"""A fused model as one GGUF file that llama.cpp loads: metadata, vocabulary, float tensors.

For the architectures below, in the form that llama.cpp's own converter gives them; what differs
from Hugging Face's weights is said where it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fpo_mlx.errors import ConfigError, pip_install
from fpo_mlx.model.gguf_vocab import Vocabulary, read_vocabulary
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import TEMPLATE

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_WANTED = (
    "num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's numbers
_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Export:
    """All but the tensors. config: what mlx-lm computes with, over config.json's other entries;
    heads: (query, key/value)."""

    architecture: str
    kind: str  # dtype of the matrices
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    heads: tuple[int, int]
    head_dim: int
    rope: Mapping[str, Any]


def file_type(dtype: str | None) -> str:
    """What the matrices are stored as: --dtype, else float16."""
    return dtype or "float16"


def prepare(folder: Path, config: Mapping[str, Any], args: Any, kind: str) -> Export:
    """Check that this model can be written, before anything is. folder: the base model's.

    args: of the loaded model, mlx-lm's dataclass; its values are written, with its defaults.
    Raises: ConfigError naming what GGUF or llama.cpp has no form for.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--export-gguf needs the package gguf: run `{pip_install('gguf')}`."
        ) from error
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        raise _no(f"a {model_type}", f"wanted one of {', '.join(ARCHITECTURES)}")
    if args is None:
        raise _no("a model without arguments", "wanted them as mlx-lm keeps them")
    own = {name: value for name, value in vars(args).items() if value is not None}
    config = {**_hub_config(folder), **config, **own}
    if lacking := [name for name in _WANTED if config.get(name) is None]:
        raise _no(f"a config.json without {', '.join(lacking)}", "wanted its values, not defaults")
    heads = int(config["num_attention_heads"])
    head_dim = int(own.get("head_dim") or config["hidden_size"] // heads)
    rope = _rope(config, own)
    _check(config, head_dim, rope)
    vocabulary = read_vocabulary(folder, int(config["vocab_size"]))
    groups = int(config.get("num_key_value_heads") or heads)
    return Export(
        ARCHITECTURES[model_type], kind, config, vocabulary, (heads, groups), head_dim, rope
    )


def _no(found: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"--export-gguf: found {found}; {wanted}. Fuse without it, and convert the folder with "
        "llama.cpp's convert_hf_to_gguf.py."
    )


def _hub_config(folder: Path) -> dict[str, Any]:
    return files.parse_json((folder / "config.json").read_text(encoding="utf-8"))


def _rope(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """theta, kind and factors that mlx-lm rotates by. own: its arguments.

    Raises: ConfigError where config.json, in transformers 5's way, has others that mlx-lm left.
    """
    theta, given = float(own["rope_theta"]), own.get("rope_scaling") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    new = config.get("rope_parameters") or {}
    new = new.get("full_attention", new)  # one block for each kind of attention
    said = float(new.get("rope_theta") or theta), new.get("rope_type") or kind
    if said != (theta, kind):
        raise _no(
            f"rope_parameters of theta {said[0]:g} ({said[1]}) where mlx-lm computes with "
            f"{theta:g} ({kind})", "wanted one of them in config.json, as rope_theta",
        )  # fmt: skip
    return {**given, "theta": theta, "kind": kind}


def _check(config: Mapping[str, Any], head_dim: int, rope: Mapping[str, Any]) -> None:
    """Raises: ConfigError for what llama.cpp would compute otherwise."""
    model_type = config["model_type"]
    if rope["kind"] not in ("default", "linear", "llama3"):
        raise _no(f"rope scaling {rope['kind']}", "wanted none, linear or llama3's")
    if config.get("use_sliding_window"):
        raise _no("a sliding window in use", f"wanted a {model_type} without one")
    if model_type not in ("gemma2", "gemma3_text") and "sliding_attention" in (
        config.get("layer_types") or ()
    ):
        raise _no("layers of sliding attention", f"wanted a {model_type} without them")
    scalar = config.get("query_pre_attn_scalar")
    if model_type.startswith("gemma") and scalar not in (None, head_dim):
        raise _no(f"query_pre_attn_scalar {scalar}", f"llama.cpp takes the head's {head_dim}")
    if model_type == "gemma3_text":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        base = {config["rope_local_base_freq"], local.get("rope_theta") or 10000.0}
        kinds = config.get("layer_types") or ()
        period = config["sliding_window_pattern"]
        odd = [
            i for i, kind in enumerate(kinds) if (kind == "full_attention") != ((i + 1) % 6 == 0)
        ]
        if base != {10000.0} or period != 6 or odd:
            raise _no("another pattern of windows than Gemma 3's", "every sixth block sees all")


def write(path: Path, export: Export, weights: dict[str, mx.array], folder: Path) -> None:
    """Write the file. weights: by mlx-lm's names, taken out as they are written, since what was
    read of a file stays in memory. folder: the fused one, whose template it gets.

    Raises: ConfigError for a value that float16 cannot hold.
    """
    import gguf

    template = folder / TEMPLATE
    if template.is_file():
        text = template.read_text(encoding="utf-8")
        export = replace(export, vocabulary=replace(export.vocabulary, template=text))
    writer = gguf.GGUFWriter(path, export.architecture)
    _metadata(writer, export)
    _put_vocabulary(writer, export.vocabulary)
    factors = rope_factors(export.rope, export.head_dim)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "float32")
    for name, theirs in their_names(export, weights).items():
        _announce(writer, theirs, weights[name].shape, export.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name in list(weights):  # one at a time: never all of them in memory
        values = _as_theirs(name, np.array(weights.pop(name).astype(mx.float32)), export)
        writer.write_tensor_data(_stored(name, values, export.kind))
    writer.close()


def their_names(export: Export, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of each of mlx-lm's tensors. Raises: ConfigError where it has none such."""
    import gguf

    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == export.architecture)
    known = gguf.get_tensor_name_map(architecture, int(export.config["num_hidden_layers"]))
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if lacking := [name for name, theirs in found.items() if theirs is None]:
        raise _no(f"the tensor {lacking[0]}", f"llama.cpp's {export.architecture} has none such")
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def _as_theirs(name: str, values: np.ndarray, export: Export) -> np.ndarray:
    """Llama's rotary halves are interleaved, Gemma's gains have their 1 added."""
    if export.architecture == "llama":
        for part, heads in zip(("q_proj.", "k_proj."), export.heads, strict=True):
            if part in name:
                return interleave(values, heads)
    if export.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads, 2, half] -> [heads, half, 2]: pairs of one rotation beside each other."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray | None:
    """What each rotary frequency is divided by under Llama 3's scaling, [head_dim / 2].

    Wavelengths below original / high_freq_factor are left, those above original / low_freq_factor
    divided by `factor`, between them the two are mixed (transformers' rope type llama3).
    """
    if rope["kind"] != "llama3":
        return None
    original = float(rope["original_max_position_embeddings"])
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    frequency = rope["theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / frequency
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _dtype(shape: Sequence[int], kind: str) -> str:
    """Vectors are always float32."""
    return "float32" if len(shape) == 1 else kind


def _announce(writer: Any, name: str, shape: Sequence[int], kind: str) -> None:
    """Say what a tensor will be like."""
    import gguf

    kind, size = _dtype(shape, kind), int(np.prod(shape))
    if kind == "bfloat16":  # gguf takes it as bytes
        bf16, inner = gguf.GGMLQuantizationType.BF16, (*shape[:-1], 2 * shape[-1])
        writer.add_tensor_info(name, inner, np.dtype(np.uint8), 2 * size, raw_dtype=bf16)
    else:
        dtype = np.dtype(kind)
        writer.add_tensor_info(name, shape, dtype, size * dtype.itemsize)


def _stored(name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as they are stored. Raises: ConfigError for one that float16 cannot hold."""
    import gguf

    kind = _dtype(values.shape, kind)
    if kind == "bfloat16":
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
    if kind == "float16" and np.abs(values).max(initial=0) > _LARGEST:
        raise ConfigError(
            f"--export-gguf: {name} has values that float16 cannot hold. Use --dtype bfloat16."
        )
    return np.ascontiguousarray(values, dtype=np.dtype(kind))


def _metadata(writer: Any, export: Export) -> None:
    config, rope = export.config, export.rope
    writer.add_file_type(FILE_TYPES[export.kind])
    writer.add_vocab_size(len(export.vocabulary.tokens))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(export.heads[0])
    writer.add_head_count_kv(export.heads[1])
    writer.add_key_length(export.head_dim)
    writer.add_value_length(export.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(rope["theta"])
    writer.add_rope_dimension_count(export.head_dim)
    if rope["kind"] == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if export.architecture == "gemma2":
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if export.architecture in ("gemma2", "gemma3") and config.get("sliding_window"):
        writer.add_sliding_window(int(config["sliding_window"]))


def _linear() -> Any:
    import gguf

    return gguf.RopeScalingType.LINEAR


def _put_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for name, i in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
