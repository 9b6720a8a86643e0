"""Sites of transformers' models: the stream gains what attention and MLP add.

As tests/unit/model/test_taps.py has it of mlx-lm's.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from fpo_mlx.errors import SaeError  # noqa: E402
from fpo_mlx.records import Site, SiteKind  # noqa: E402
from fpo_mlx.reference.torch_backend.taps import Recorder, find_tap  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.4},
    "glm4": {"head_dim": 8},
    "minicpm3": {"scale_depth": 1.4, "dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
                 "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 8},
    "afmoe": {"head_dim": 8, "num_dense_layers": 4, "moe_intermediate_size": 16},
}  # fmt: skip
MIXED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 16, "layer_types": ["attention"] * 4,
                         "mamba_n_heads": 4},
    "gemma3n_text": {"head_dim": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300,
                     "activation_sparsity_pattern": [0.0] * 4,
                     "layer_types": ["full_attention"] * 4},
    "hyperclovax": {"head_dim": 8, "use_post_norm": True},
    "lfm3": {"use_sandwich_norm": True, "layer_types": ["full_attention"] * 4,
             "rope_parameters": {
                 "full_attention": {"rope_type": "default", "rope_theta": 40000.0}}},
}  # fmt: skip


def opened(family: str) -> Any:
    config = AutoConfig.for_model(family, **tiny_models.dense() | (MODELS | MIXED)[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def seen_at(family: str, *kinds: SiteKind) -> list[Any]:
    model = opened(family)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
        taps = tuple(find_tap(model, Site(2, kind)) for kind in kinds)
        recorder, at = Recorder(taps), (torch.zeros(5, dtype=torch.long), torch.arange(5))
        model(torch.tensor([[5, 9, 3, 22, 17]]))
        return [recorder.rows(tap, at) for tap in taps]


@pytest.mark.parametrize("family", MODELS)
def test_the_stream_gains_what_attention_and_mlp_add(family):
    before, attention, middle, mlp, after = seen_at(
        family, "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"
    )
    torch.testing.assert_close(before + attention, middle)
    torch.testing.assert_close(middle + mlp, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "glm4", "afmoe"])
def test_the_mlps_unscaled_input_is_the_normed_stream_between(family):
    middle, unscaled = seen_at(family, "resid_mid", "mlp_in_unscaled")
    wanted = middle / middle.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(unscaled, wanted, atol=1e-3, rtol=1e-3)


def test_a_model_without_an_rms_norm_before_its_mlp_has_no_unscaled_input():
    with pytest.raises(SaeError, match="cannot be read"):
        seen_at("olmo2", "mlp_in_unscaled")


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("granitemoehybrid", "mlp_out", "shared_mlp"),
        ("gemma3n_text", "attn_out", "altup"),
        ("gemma3n_text", "mlp_out", "altup"),
        ("gemma3n_text", "resid_mid", "altup"),
        ("hyperclovax", "attn_out", "post_norm1"),
        ("hyperclovax", "resid_mid", "post_norm1"),
        ("lfm3", "mlp_out", "post_ffn_norm"),
    ],
)
def test_a_block_that_adds_to_its_stream_in_a_way_of_its_own_is_refused_by_name(family, kind, name):
    with pytest.raises(SaeError, match=f"The {kind} of block 2 .* with {name} adds"):
        find_tap(opened(family), Site(2, kind))


def test_what_the_attention_of_a_block_with_a_shared_mlp_adds_is_read():
    before, attention, middle = seen_at("granitemoehybrid", "resid_pre", "attn_out", "resid_mid")
    torch.testing.assert_close(before + attention, middle)


def test_norms_behind_attention_and_mlp_that_a_model_leaves_out_are_no_hindrance(monkeypatch):
    """HyperCLOVA X has something that does nothing in their place."""
    monkeypatch.setitem(MODELS, "hyperclovax", {"head_dim": 8, "use_post_norm": False})
    monkeypatch.delitem(MIXED, "hyperclovax")
    before, attention, middle, mlp, after = seen_at(
        "hyperclovax", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"
    )
    torch.testing.assert_close(before + attention, middle)
    torch.testing.assert_close(middle + mlp, after, atol=1e-4, rtol=1e-4)
