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

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_make import (
    BLOCKS,
    GEMMA3_KEYS,
    GEMMA4_KEYS,
    HEADS,
    HIDDEN,
    VOCAB,
    dense,
    gemma3_settings,
    gemma4_settings,
    make,
    mlx_experts_apart,
    rename_weights,
    windowed,
)

Maker = Callable[..., Path]


def tiny_llama(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """The plain pre-norm decoder with an untied head."""
    return make(folder, "llama", seed, tokenizer, dense() | settings)


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
    return make(folder, "gemma2", seed, tokenizer, dense() | own | settings)


def tiny_gemma3_text(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """A window of 6 tokens on two blocks of three, two rotary bases, query and key norms.

    Hidden size 64, not 32: mlx-lm rounds the embedding's factor sqrt(hidden) to bfloat16,
    transformers does not, and sqrt(64) is exact in both.
    """
    return make(folder, "gemma3_text", seed, tokenizer, gemma3_settings() | settings, GEMMA3_KEYS)


def tiny_qwen3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Query and key norms, a head size that is not hidden / heads, tied head."""
    own = {"head_dim": 16, "tie_word_embeddings": True}
    return make(folder, "qwen3", seed, tokenizer, dense() | own | settings)


def tiny_mistral(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Saved as mistral; mlx-lm runs it with its llama code, without a sliding window.

    Heads larger than hidden / heads, as Mistral Nemo has them.
    """
    own = {"head_dim": 16, "sliding_window": None}
    return make(folder, "mistral", seed, tokenizer, dense() | own | settings)


def tiny_phi3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """One fused projection for q, k and v, another for gate and up."""
    own = {"original_max_position_embeddings": 512}
    return make(folder, "phi3", seed, tokenizer, dense() | own | settings)


def tiny_olmo2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """No pre-norms: attention and MLP read the stream, and their outputs are normed."""
    return make(folder, "olmo2", seed, tokenizer, dense() | settings)


def tiny_granite(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Four multipliers: on embeddings, attention, residual and logits."""
    own = {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    }
    return make(folder, "granite", seed, tokenizer, dense() | own | settings)


def tiny_cohere2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Parallel attention and MLP, rotary positions on windowed blocks only, scaled logits."""
    own = {
        "sliding_window": 6,
        "logit_scale": 0.5,
        "layer_types": [windowed(block, every=2) for block in range(BLOCKS)],
        "tie_word_embeddings": True,
    }
    for_mlx = {"sliding_window_pattern": 2, "head_dim": HIDDEN // HEADS}
    return make(folder, "cohere2", seed, tokenizer, dense() | own | settings, for_mlx)


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
    make(folder, "gpt2", seed, tokenizer, own | settings, {"n_ctx": 512})
    rename_weights(folder, "transformer.", "")  # mlx-lm knows the hub's names, which lack it
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
    return make(folder, "gpt_neox", seed, tokenizer, dense() | own | settings, for_mlx)


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
    return make(folder, "qwen2_moe", seed, tokenizer, dense() | own | settings)


def tiny_mixtral(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Four routed experts, two a token, weights renormalised."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return make(folder, "mixtral", seed, tokenizer, dense() | own | settings)


def tiny_qwen2(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Biases on q, k and v; tied head."""
    return make(
        folder, "qwen2", seed, tokenizer, dense() | {"tie_word_embeddings": True} | settings
    )


def tiny_qwen3_moe(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """Four routed experts, two a token, weights renormalised; one block of the four is dense."""
    own = {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    }
    for_mlx = {"num_experts": 4}
    return make(folder, "qwen3_moe", seed, tokenizer, dense() | own | settings, for_mlx)


def tiny_qwen3_next(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """A hybrid: three blocks of gated delta rule, one of gated attention; experts everywhere."""
    own = {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 40000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    for_mlx = {"partial_rotary_factor": 0.25, "full_attention_interval": 4}
    return make(folder, "qwen3_next", seed, tokenizer, dense() | own | settings, for_mlx)


def tiny_gemma(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Gains of 1 + weight, scaled embeddings, tied head.

    The MLP's activation is exact gelu, as mlx-lm has it; the published config says tanh-gelu.
    """
    own = {"head_dim": 16, "hidden_act": "gelu_python"}
    return make(folder, "gemma", seed, tokenizer, dense() | own | settings)


def tiny_gemma3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """`tiny_gemma3_text` inside the wrapper that holds the vision tower, which text never meets."""
    text = gemma3_settings() | settings
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    ids = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
    own = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, **ids}
    for_mlx = {"vocab_size": VOCAB, "text_config": GEMMA3_KEYS}
    return make(folder, "gemma3", seed, tokenizer, own, for_mlx)


def tiny_gemma4_text(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """Per-layer embeddings and gates, a scalar on every block, two head sizes, a window of 6,
    and two blocks at the end that attend to the keys and values of earlier ones."""
    settings = gemma4_settings() | settings
    return make(folder, "gemma4_text", seed, tokenizer, settings, GEMMA4_KEYS)


def tiny_gemma4(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """`tiny_gemma4_text` as the language model of the published wrapper, without its towers."""
    own = {"text_config": gemma4_settings() | settings, "vision_config": None, "audio_config": None}
    for_mlx = {"vocab_size": VOCAB, "text_config": GEMMA4_KEYS}
    return make(folder, "gemma4", seed, tokenizer, own, for_mlx)


def tiny_smollm3(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Rotary positions on three blocks of four; tied head."""
    return make(folder, "smollm3", seed, tokenizer, dense() | settings)


def tiny_deepseek_v2(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """Latent attention with yarn; a dense block, then routed experts beside shared ones."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    own = {
        "num_key_value_heads": HEADS,
        "rope_parameters": yarn,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    for_mlx = {"rope_scaling": yarn}
    return make(folder, "deepseek_v2", seed, tokenizer, dense() | own | settings, for_mlx)


def tiny_deepseek_v3(
    folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any
) -> Path:
    """Latent attention that mlx-lm runs without building the keys; experts chosen by group."""
    own = {
        "num_key_value_heads": HEADS,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    }
    return make(folder, "deepseek_v3", seed, tokenizer, dense() | own | settings)


def tiny_gpt_oss(folder: Path, *, seed: int = 0, tokenizer: bool = False, **settings: Any) -> Path:
    """Attention sinks, a window of 6 on every other block, yarn, experts with biases.

    Yarn's bounds are rounded, as mlx-lm has them; the published config says they are not.
    """
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 40000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    own = {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": [windowed(block, every=2) for block in range(BLOCKS)],
        "rope_parameters": yarn,
    }
    for_mlx = {"rope_scaling": yarn}
    make(folder, "gpt_oss", seed, tokenizer, dense() | own | settings, for_mlx)
    return mlx_experts_apart(Path(folder))


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
    "qwen2": tiny_qwen2,
    "qwen3_moe": tiny_qwen3_moe,
    "qwen3_next": tiny_qwen3_next,
    "gemma": tiny_gemma,
    "gemma3": tiny_gemma3,
    "gemma4_text": tiny_gemma4_text,
    "gemma4": tiny_gemma4,
    "smollm3": tiny_smollm3,
    "deepseek_v2": tiny_deepseek_v2,
    "deepseek_v3": tiny_deepseek_v3,
    "gpt_oss": tiny_gpt_oss,
}
