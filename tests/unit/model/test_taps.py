"""What a site is: the stream gains what attention and MLP add, however a block's norms are called.

Tiny random models of mlx-lm's own classes; no other library is asked.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402

from fpo_mlx.errors import ModelError  # noqa: E402
from fpo_mlx.model.taps import Tap, finish, norm_and_residual, tap_point  # noqa: E402
from fpo_mlx.model.trees import arrays_of, blocks_of  # noqa: E402
from fpo_mlx.records import Site, SiteKind  # noqa: E402

COMMON = {
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 40,
    "max_position_embeddings": 64, "rope_theta": 1e4, "attention_bias": False,
}  # fmt: skip
MINICPM = {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0}
LATENT = {"q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 16}
ROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
        "original_max_position_embeddings": 64}  # fmt: skip
GRANITE = {"residual_multiplier": 0.4, "embedding_multiplier": 2.0, "logits_scaling": 1.0,
           "attention_multiplier": 0.3}  # fmt: skip
EXPERTS = {"layer_types": ["attention"] * 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "shared_intermediate_size": 16}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "olmo2": {},
    "exaone4": {"tie_word_embeddings": False, "rope_scaling": None, "sliding_window": None,
                "sliding_window_pattern": None},
    "granite": GRANITE | {"mlp_bias": False},
    "glm4": {"partial_rotary_factor": 0.5},
    "minicpm": MINICPM,
    "minicpm3": MINICPM | LATENT | {"rope_scaling": ROPE},
    "afmoe": LAYERS | {"num_dense_layers": 4, "sliding_window": 8},
    "plamo3": {"window_size": 8},
}  # fmt: skip
REFUSED = {"granitemoehybrid": GRANITE | EXPERTS}  # their mlp_out


def opened(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose norms have gains of their own, and its config."""
    mx.random.seed(0)
    config = COMMON | (MODELS | REFUSED)[family] | {"model_type": family}
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config))
    for name, array in arrays_of(model.parameters()):
        if array.ndim == 1:
            model.load_weights([(name, array + 0.3 * mx.random.normal(array.shape))], strict=False)
    return model, config


def seen_at(family: str, layer: int, *kinds: SiteKind) -> list[np.ndarray]:
    model, config = opened(family)
    sites = [Site(layer, kind) for kind in kinds]
    with ExitStack() as stack:
        taps = [Tap(*tap_point(blocks_of(model)[layer], site)) for site in sites]
        seen = [stack.enter_context(tap.recording()) for tap in taps]
        mx.eval(model(mx.array([[5, 9, 3, 22, 17]])))
    how = norm_and_residual(config)
    return [np.array(finish(one[-1], site, *how)) for one, site in zip(seen, sites, strict=True)]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("layer", [0, 3])
def test_the_stream_gains_what_attention_and_mlp_add(family, layer):
    before, attention, middle, mlp, after = seen_at(
        family, layer, "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"
    )
    np.testing.assert_allclose(before + attention, middle, atol=1e-5)
    np.testing.assert_allclose(middle + mlp, after, atol=1e-5)
    assert min(np.abs(part).max() for part in (attention, mlp)) > 1e-3


@pytest.mark.parametrize("family", ["glm4", "afmoe", "plamo3", "minicpm"])
def test_the_mlps_unscaled_input_is_the_normed_stream_between(family):
    middle, unscaled = seen_at(family, 1, "resid_mid", "mlp_in_unscaled")
    wanted = middle / np.sqrt(np.square(middle).mean(-1, keepdims=True) + COMMON["rms_norm_eps"])
    np.testing.assert_allclose(unscaled, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out", "resid_mid", "mlp_in_unscaled"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_attn_alpha", mx.zeros(2)),
        ("mlps", [nn.Linear(2, 2)]),
        ("attn_gain", nn.Linear(2, 2)),
        ("altup", nn.Linear(2, 2)),
    ],
)
def test_a_block_that_adds_to_its_stream_in_a_way_of_its_own_is_refused_by_name(kind, name, value):
    block = nn.Module()
    block.self_attn = block.mlp = nn.Linear(2, 2)
    block.post_attention_layernorm = nn.RMSNorm(2)
    tap_point(block, Site(0, kind))
    block[name] = value
    with pytest.raises(ModelError, match=f"the {kind} of block 0 .* with {name} adds"):
        tap_point(block, Site(0, kind))


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("name", ["post_norm1", "post_ffn_norm", "post_attention_residual_gate"])
def test_a_norm_or_gate_behind_a_part_by_an_unknown_name_is_refused_by_it(kind, name):
    block = nn.Module()
    block.self_attn = block.mlp = nn.Linear(2, 2)
    block.post_attention_layernorm = block.post_feedforward_layernorm = nn.RMSNorm(2)
    block.post_feedforward_layernorm_1 = block.post_per_layer_input_norm = nn.RMSNorm(2)
    tap_point(block, Site(0, kind))
    block[name] = nn.RMSNorm(2)
    with pytest.raises(ModelError, match=f"the {kind} of block 0 .* with {name} adds"):
        tap_point(block, Site(0, kind))
    for other in ("mlp_raw", "attn_raw", "resid_post"):
        tap_point(block, Site(0, other))


def test_an_mlp_of_experts_and_a_shared_part_is_refused_by_name_and_its_attention_is_read():
    """Granite 4 adds what both give; either alone is not what the stream gains."""
    model, _ = opened("granitemoehybrid")
    with pytest.raises(ModelError, match="the mlp_out of block 1 .* with shared_mlp adds"):
        tap_point(blocks_of(model)[1], Site(1, "mlp_out"))
    before, attention, middle = seen_at("granitemoehybrid", 1, "resid_pre", "attn_out", "resid_mid")
    np.testing.assert_allclose(before + attention, middle, atol=1e-5)


def test_parts_that_are_lists_are_refused_by_name():
    block = nn.Module()
    block.self_attn = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ModelError, match="has none of self_attn"):
        tap_point(block, Site(0, "attn_raw"))
