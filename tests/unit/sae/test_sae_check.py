"""Hook names to sites, and whether an SAE fits a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import random_sae
from tiny_saes import CASES

from fpo_mlx.config import load_config
from fpo_mlx.errors import SaeError
from fpo_mlx.pipeline.job import at_site
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.check import check_fit, resolve_site, z_widths
from fpo_mlx.sae.files import listed_weights
from fpo_mlx.sae.hooks import layer_in, site_of

HOOKS = [
    ("blocks.3.hook_resid_post", "resid_post of block 3"),
    ("blocks.0.hook_resid_pre", "resid_pre of block 0"),
    ("blocks.11.attn.hook_z", "attn_z of block 11"),
    ("blocks.5.ln2.hook_normalized", "mlp_in_unscaled of block 5"),
    ("blocks.5.hook_mlp_in", "resid_mid of block 5"),
    ("model.layers.3.output", "resid_post of block 3"),
    ("model.layers.3.pre_feedforward_layernorm.output", "mlp_in of block 3"),
    ("model.layers.3.post_mlp_layernorm", "mlp_out of block 3"),
    ("model.layers.3.post_self_attn_layernorm.output", "attn_out of block 3"),
    ("model.layers.3.pre_mlp_layernorm", "mlp_in of block 3"),
    ("model.layers.3.post_feedforward_layernorm", "mlp_out of block 3"),
    ("model.layers.3.pre_mlp_layernorm.input", None),
    ("model.language_model.layers.12.mlp", "mlp_raw of block 12"),
    ("transformer.h.4.attn", "attn_raw of block 4"),
    ("gpt_neox.layers.2", "resid_post of block 2"),
    ("attn_out_layer_7", "attn_raw of block 7"),
    ("embed_tokens", "resid_pre of block 0"),
    ("blocks.3.hook_unheard_of", None),
    ("", None),
    (None, None),
]


@pytest.mark.parametrize(("name", "site"), HOOKS)
def test_hook_names_become_sites(name: str | None, site: str | None):
    found = site_of(name)
    assert (str(found) if found else None) == site


@pytest.mark.parametrize(
    ("own", "given", "told"),
    [(None, {}, True), (None, {"site": "mlp_out"}, False), (Site(1, "mlp_out"), {}, False)],
)
def test_a_site_that_is_assumed_is_said(own, given, told):
    """Files without a site were read at the block's output without a word."""
    said: list[str] = []
    sae = replace(random_sae(16), site=own, source="their-sae")
    config = load_config({"layer": 1, **given})
    about = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    placed = at_site(sae, config, about, said.append).site
    assert str(placed) == f"{'resid_post' if told else 'mlp_out'} of block 1"
    assert ("their-sae does not say its site" in "".join(said)) is told


@pytest.mark.parametrize("ending", ["", ".output"])
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("gemma-2-2b", "attn_out"),
        ("google/gemma-3-270m-it", "attn_out"),
        ("mlx-community/gemma-3n-E2B-it-4bit", "attn_out"),
        ("google/gemma2-27b", "attn_out"),
        ("allenai/OLMo-2-1124-7B", "attn_out"),
        ("allenai/Olmo-3.1-32B-Think", "attn_out"),
        ("LGAI-EXAONE/EXAONE-4.0-1.2B", "attn_out"),
        ("arcee-ai/Trinity-Mini", "attn_out"),
        ("google/gemma-2b", "mlp_in"),
        ("gemma-1.1-7b-it", "mlp_in"),
        ("allenai/OLMo-7B-0724-hf", "mlp_in"),
        ("allenai/OLMoE-1B-7B-0924", "mlp_in"),
        ("meta-llama/Llama-3.2-1B", "mlp_in"),
        ("Qwen/Qwen3-0.6B", "mlp_in"),
        ("HuggingFaceTB/SmolLM2-135M", "mlp_in"),
        ("google/medgemma-4b-it", None),
        ("allenai/Olmo-Hybrid-7B", None),
        ("my-model", None),
        (None, None),
    ],
)
def test_the_norm_after_attention_is_behind_it_or_before_the_mlp_by_the_model(model, kind, ending):
    found = site_of(f"model.layers.3.post_attention_layernorm{ending}", model_name=model)
    assert (found.kind if found else None) == kind


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("layer_25/width_16k/average_l0_55", 25),
        ("layers.10.mlp", 10),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", 19),
        ("layer7.sae.pt", 7),
        ("average_l0_55/params", None),
    ],
)
def test_the_block_is_found_in_a_path(text: str, layer: int | None):
    assert layer_in(text) == layer


def small(tmp_path: Path, name: str = "saelens_topk") -> SaeWeights:
    case = next(case for case in CASES if case.name == name)
    return load_sae(case.make(tmp_path, np.random.default_rng(0)).path)


def test_an_sae_that_fits_raises_nothing(tmp_path: Path):
    sae = small(tmp_path)
    site = resolve_site(sae)
    assert check_fit(sae, site=site, hidden_size=12, n_layers=4, model_name="x/tiny-4bit") == ()


def test_an_sae_of_another_model_is_refused(tmp_path: Path):
    sae = small(tmp_path)
    with pytest.raises(SaeError, match=r"vectors of 12, .* this model has 16 \(hidden size\)"):
        check_fit(sae, site=resolve_site(sae), hidden_size=16, n_layers=4)
    with pytest.raises(SaeError, match="for block 3, but the model has blocks 0 to 2"):
        check_fit(sae, site=resolve_site(sae), hidden_size=12, n_layers=3)
    with pytest.raises(SaeError, match=r"has 32 or 64 \(heads x head size\)"):
        check_fit(
            sae, site=resolve_site(sae, kind="attn_z"), hidden_size=12, n_layers=4,
            z_sizes={64, 32},
        )  # fmt: skip


def test_overrides_of_site_and_another_model_are_called_out(tmp_path: Path):
    sae = small(tmp_path)
    warnings = check_fit(
        sae, site=resolve_site(sae, layer=2), hidden_size=12, n_layers=4, model_name="big"
    )
    assert "trained on resid_post of block 3; it is used on resid_post of block 2" in warnings[0]
    assert "trained on tiny, the model is big" in warnings[1]


def test_an_sae_without_a_site_needs_a_layer(tmp_path: Path):
    sae = small(tmp_path, "saelens_bfloat16")
    with pytest.raises(SaeError, match="Give --layer N"):
        resolve_site(sae)
    assert str(resolve_site(sae, layer=5)) == "resid_post of block 5"
    with pytest.raises(SaeError, match="'residual' is unknown; wanted one of resid_pre"):
        resolve_site(sae, layer=5, kind="residual")


HEADS = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}
SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention"]}
STEP = HEADS | {"attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2}}
MIMO = HEADS | {"hybrid_layer_pattern": [1, 0], "v_head_dim": 16,
                "swa_num_attention_heads": 2, "swa_v_head_dim": 10}  # fmt: skip
WIDTHS = [
    (STEP | SLIDING_FIRST, [{48}, {32}]),
    (STEP, [{48}, {32}]),
    (HEADS | {"attention_other_setting": None}, [{32}, {32}]),
    (MIMO, [{20}, {64}]),
    (HEADS | {"num_attention_heads_per_layer": [3, 5]}, [{24}, {40}]),
    (HEADS | {"hybrid_override_pattern": "M*", "mamba_num_heads": 8}, [set(), set()]),
    (HEADS | {"hidden_size_per_head": 8}, [set(), set()]),
    (HEADS | {"v_head_dim": 16, "layer_group_size": 2}, [set(), set()]),
    (HEADS | {"v_head_dim": 16, "linear_attn_config": {"head_dim": 8}}, [set(), set()]),
    (HEADS | {"num_attention_heads": [4, 2]}, [set(), set()]),
]


@pytest.mark.parametrize(("config", "widths"), WIDTHS)
def test_what_a_blocks_projection_reads_is_the_blocks_own_or_not_known(config, widths):
    assert [z_widths(config, layer) for layer in (0, 1)] == widths


def test_a_block_or_heads_that_a_model_lacks_are_no_reason_to_break_before_they_are_told():
    laguna = {"num_attention_heads": 4, "hidden_size": 32, "num_attention_heads_per_layer": [4, 8]}
    assert z_widths(laguna, 1) == {64}
    assert z_widths(laguna, 99) == {32}
    assert z_widths({"num_attention_heads": 0, "hidden_size": 32}, 0) == set()


def test_where_gemma_3_leaves_its_heads_size_out_it_is_its_class_s_own():
    """As the 12B's config.json does: 16 heads of 256, and a hidden size of 3840."""
    config = {"model_type": "gemma3_text", "hidden_size": 3840, "num_attention_heads": 16}
    assert z_widths(config, 0) == {16 * 256}
    assert z_widths(config | {"head_dim": 128}, 0) == {16 * 128}
    assert z_widths(config | {"model_type": "llama"}, 0) == {3840}


def test_a_name_that_is_not_there_is_answered_with_what_lies_nearest():
    names = [f"attn_out/layer_{i}/params.safetensors" for i in range(20)]
    names += [f"resid_post_all/layer_{i}_width_16k/params.safetensors" for i in (3, 5)]
    with pytest.raises(SaeError) as error:
        listed_weights(names, "resid_post_all/layer_4_width_16k", "google/it")
    assert "layer_3_width_16k" in str(error.value)
    assert "attn_out" not in str(error.value)
    with pytest.raises(SaeError, match="attn_out/layer_0"):
        listed_weights(names, "else/where", "google/it")
