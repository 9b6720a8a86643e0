"""Tiny random models of many architectures, saved so that transformers and mlx-lm load the same.

`tiny_llama(folder)` and its like write `config.json` and `model.safetensors` (float32) into the
folder and return it. Every call with the same seed writes the same weights. The scale of the
weights is near 1, not the usual 0.02, so that attention is peaked, soft-caps bite and a slip in
any part of the forward pass moves the logits by far more than a test's tolerance.

    folder = tiny_gemma2(tmp_path, tokenizer=True)
    model, config = mlx_lm.utils.load_model(folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, BLOCKS, HEADS, KV_HEADS, MLP = 300, 32, 4, 4, 2, 48

Maker = Callable[..., Path]


def tiny_llama(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """The plain pre-norm decoder with an untied head."""
    return _make(folder, "llama", seed, tokenizer, _dense() | settings)


def tiny_gemma2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Post-norms, tied head, soft-caps on attention and logits, low enough to matter.

    mlx-lm has no sliding window for it; the tiny model stays far below the window of 4096.
    """
    own = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return _make(folder, "gemma2", seed, tokenizer, _dense() | own | settings)


def tiny_gemma3_text(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """A window of 6 tokens on two blocks of three, two rotary bases, query and key norms.

    Hidden size 64, not 32: mlx-lm rounds the embedding's factor sqrt(hidden) to bfloat16,
    transformers does not, and sqrt(64) is exact in both.
    """
    own = {
        "hidden_size": 64,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "layer_types": [_windowed(block, every=3) for block in range(BLOCKS)],
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 40000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    for_mlx = {"sliding_window_pattern": 3, "rope_theta": 40000.0, "rope_local_base_freq": 10000.0}
    return _make(folder, "gemma3_text", seed, tokenizer, _dense() | own | settings, for_mlx)


def tiny_qwen3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Query and key norms, a head size that is not hidden / heads, tied head."""
    own = {"head_dim": 16, "tie_word_embeddings": True}
    return _make(folder, "qwen3", seed, tokenizer, _dense() | own | settings)


def tiny_mistral(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Saved as mistral; mlx-lm runs it with its llama code, without a sliding window."""
    own = {"head_dim": 8, "sliding_window": None}
    return _make(folder, "mistral", seed, tokenizer, _dense() | own | settings)


def tiny_phi3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """One fused projection for q, k and v, another for gate and up."""
    own = {"original_max_position_embeddings": 512}
    return _make(folder, "phi3", seed, tokenizer, _dense() | own | settings)


def tiny_olmo2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """No pre-norms: attention and MLP read the stream, and their outputs are normed."""
    return _make(folder, "olmo2", seed, tokenizer, _dense() | settings)


def tiny_granite(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Four multipliers: on embeddings, attention, residual and logits."""
    own = {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    }
    return _make(folder, "granite", seed, tokenizer, _dense() | own | settings)


def tiny_cohere2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Parallel attention and MLP, rotary positions on windowed blocks only, scaled logits."""
    own = {
        "sliding_window": 6,
        "logit_scale": 0.5,
        "layer_types": [_windowed(block, every=2) for block in range(BLOCKS)],
        "tie_word_embeddings": True,
    }
    for_mlx = {"sliding_window_pattern": 2, "head_dim": HIDDEN // HEADS}
    return _make(folder, "cohere2", seed, tokenizer, _dense() | own | settings, for_mlx)


def tiny_gpt2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Learned positions, biases everywhere, weights stored as [in, out], tied head."""
    own = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": BLOCKS,
        "n_head": HEADS,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _make(folder, "gpt2", seed, tokenizer, own | settings, {"n_ctx": 512})
    _rename_weights(folder, "transformer.", "")  # mlx-lm knows the hub's names, which lack it
    return Path(folder)


def tiny_gpt_neox(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Parallel residual, rotary on a quarter of each head, biases everywhere.

    The MLP's activation is tanh-gelu, as mlx-lm has it; Pythia's own config says exact gelu.
    """
    own = {
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4 * HIDDEN,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    for_mlx = {"rotary_emb_base": 10000, "rotary_pct": 0.25}
    return _make(folder, "gpt_neox", seed, tokenizer, _dense() | own | settings, for_mlx)


def tiny_qwen2_moe(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """Four routed experts, two a token, beside a shared one; biases on q, k and v.

    The two best routing weights are not renormalised, which is all that mlx-lm offers.
    """
    own = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    }
    return _make(folder, "qwen2_moe", seed, tokenizer, _dense() | own | settings)


def tiny_mixtral(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Four routed experts, two a token, weights renormalised."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return _make(folder, "mixtral", seed, tokenizer, _dense() | own | settings)


MAKERS: dict[str, Maker] = {
    "llama": tiny_llama,
    "gemma2": tiny_gemma2,
    "gemma3_text": tiny_gemma3_text,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "phi3": tiny_phi3,
    "olmo2": tiny_olmo2,
    "granite": tiny_granite,
    "cohere2": tiny_cohere2,
    "gpt2": tiny_gpt2,
    "gpt_neox": tiny_gpt_neox,
    "qwen2_moe": tiny_qwen2_moe,
    "mixtral": tiny_mixtral,
}


def _dense() -> dict[str, Any]:
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


def _windowed(block: int, every: int) -> str:
    return "full_attention" if block % every == every - 1 else "sliding_attention"


def _make(
    folder: Path,
    model_type: str,
    seed: int,
    tokenizer: bool,
    settings: dict[str, Any],
    for_mlx: dict[str, Any] | None = None,
) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.save_pretrained(folder)
    _write_mlx_keys(folder, for_mlx or {})
    if tokenizer:
        from tiny_tokenizer import build_tiny_tokenizer

        build_tiny_tokenizer(folder)
    return folder


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


def _owner(model: Any, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def _rename_weights(folder: Path, prefix: str, to: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "model.safetensors"
    weights = {to + name.removeprefix(prefix): array for name, array in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _write_mlx_keys(folder: Path, extra: dict[str, Any]) -> None:
    """mlx-lm reads rope_theta; transformers 5 writes it inside rope_parameters and reads both."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    path.write_text(json.dumps(config | extra, indent=2))
