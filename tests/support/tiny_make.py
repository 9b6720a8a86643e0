"""How the makers of `tiny_models` write a model's folder: sizes, random weights, mlx-lm's keys."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, BLOCKS, HEADS, KV_HEADS, MLP = 300, 32, 4, 4, 2, 48
TRANSFORMERS = "transformers"  # subfolder, where it cannot share the weights' file


def dense() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 40000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


GEMMA3_KEYS = {  # mlx-lm's names
    "sliding_window_pattern": 3,
    "rope_theta": 40000.0,
    "rope_local_base_freq": 10000.0,
}


def gemma3_settings() -> dict[str, Any]:
    own = {
        "hidden_size": 64,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": [windowed(block, every=3) for block in range(BLOCKS)],
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 40000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return dense() | own


GEMMA4_KEYS = {"global_head_dim": 16, "sliding_window_pattern": 2}


def gemma4_settings() -> dict[str, Any]:
    own = {
        "num_hidden_layers": 6,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 6,
        "layer_types": [windowed(block, every=2) for block in range(6)],
        "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 40000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return dense() | own


def windowed(block: int, every: int) -> str:
    return "full_attention" if block % every == every - 1 else "sliding_attention"


def make(
    folder: Path,
    model_type: str,
    seed: int,
    tokenizer: bool,
    settings: dict[str, Any],
    for_mlx: dict[str, Any] | None = None,
) -> Path:
    """A process makes each model once; another folder of the same gets a copy of its files."""
    said = json.dumps([model_type, seed, tokenizer, settings, for_mlx], sort_keys=True)
    if said not in _made:
        place = Path(tempfile.mkdtemp(prefix="tiny-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        _make(place, model_type, seed, tokenizer, settings, for_mlx or {})
        _made[said] = place
    return Path(shutil.copytree(_made[said], folder, dirs_exist_ok=True))


_made: dict[str, Path] = {}


def _make(
    folder: Path,
    model_type: str,
    seed: int,
    tokenizer: bool,
    settings: dict[str, Any],
    for_mlx: dict[str, Any],
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():  # what is not drawn below: decay rates of recurrent blocks
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.save_pretrained(folder)
    _write_mlx_keys(folder, for_mlx)
    if tokenizer:
        from tiny_tokenizer import build_tiny_tokenizer

        build_tiny_tokenizer(folder)


def _randomise(model: Any, seed: int) -> None:
    """Matrices get std 1.5 / sqrt(fan in), embeddings 0.5; norms and biases move off 1 and 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.data += 0.2 * noise
        elif "embed" in name or "wte" in name or "wpe" in name:
            weight.data = 0.5 * noise
        else:
            fan_in = weight.shape[0] if "Conv1D" in _owner(model, name) else weight.shape[-1]
            weight.data = 1.5 * noise / fan_in**0.5
    for name, buffer in model.named_buffers():
        if name.endswith(("layer_scalar", "e_score_correction_bias")):  # Gemma 4, DeepSeek 3
            buffer += 0.2 * torch.rand(buffer.shape, generator=generator)


def _owner(model: Any, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def rename_weights(folder: Path, prefix: str, to: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "model.safetensors"
    weights = {to + name.removeprefix(prefix): array for name, array in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def mlx_experts_apart(folder: Path) -> Path:
    """gpt_oss in float: mlx-lm wants other experts than transformers, which gets its own folder.

    (Published weights are MXFP4 blocks, which both read.)
    """
    from safetensors.torch import load_file, save_file

    apart = folder / TRANSFORMERS
    apart.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, apart / name)
    weights = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if name.endswith("gate_up_proj"):  # [E, in, 2 out], gate and up in turns
            for i, part in enumerate(("gate_proj", "up_proj")):
                key = name.replace("gate_up_proj", part) + ".weight"
                weights[key] = array[..., i::2].mT.contiguous()
        elif name.endswith("gate_up_proj_bias"):
            for i, part in enumerate(("gate_proj", "up_proj")):
                weights[name.replace("gate_up_proj_bias", part) + ".bias"] = array[
                    ..., i::2
                ].contiguous()
        elif name.endswith("experts.down_proj"):
            weights[name + ".weight"] = array.mT.contiguous()
        else:
            weights[name.replace("down_proj_bias", "down_proj.bias")] = array
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def for_transformers(folder: Path) -> Path:
    """Where transformers finds the weights of a tiny model's folder."""
    apart = Path(folder) / TRANSFORMERS
    return apart if apart.is_dir() else Path(folder)


def _write_mlx_keys(folder: Path, extra: dict[str, Any]) -> None:
    """mlx-lm reads rope_theta; transformers 5 writes it inside rope_parameters and reads both."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    inner = config.get("text_config", {}) | extra.get("text_config", {})
    config |= extra | ({"text_config": inner} if inner else {})
    path.write_text(json.dumps(config, indent=2))
