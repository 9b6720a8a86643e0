"""The oracle's model side: sites, LoRA by mlx-lm's names, and gradients against slopes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import (
    Setup,
    adapters_off,
    attach_lora,
    hidden_and_logits,
    load_oracle,
    loss_and_grads,
    preset,
)
from tiny_models import HIDDEN, MAKERS, tiny_gemma2, tiny_llama

from fpo_mlx.records import SaeWeights, Site, TokenPair

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOKENS = [5, 17, 3, 250, 99, 42, 7, 8, 120]


# Sites --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: MAKERS[name](root / name) for name in MAKERS}


@pytest.mark.parametrize("architecture", MAKERS)
def test_sites_add_up_to_the_residual_stream(architecture: str, folders: dict[str, Path]):
    model = load_oracle(folders[architecture])
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = [Site(1, kind) for kind in kinds]
    (pre, attn, mid, mlp, post, after), logits = hidden_and_logits(
        model, TOKENS, *sites, Site(2, "resid_pre")
    )
    assert post.shape[0] == logits.shape[0] == len(TOKENS)
    assert attn.abs().max() > 0.1
    assert mlp.abs().max() > 0.1
    np.testing.assert_allclose(mid, pre + attn, atol=1e-12)
    if architecture.startswith("gemma4"):  # adds its own embedding, then scales
        text = getattr(model.model, "language_model", model.model)
        layer = text.layers[1]
        own = torch.nn.functional.gelu(layer.per_layer_input_gate(mid + mlp), approximate="tanh")
        own = own * per_layer_input(text, 1)
        added = layer.post_per_layer_input_norm(layer.per_layer_projection(own))
        np.testing.assert_allclose(post, layer.layer_scalar * (mid + mlp + added), atol=1e-5)
    else:
        np.testing.assert_allclose(post, pre + attn + mlp, atol=1e-12)
    np.testing.assert_array_equal(post, after)


def per_layer_input(text, layer: int) -> torch.Tensor:
    tokens = torch.tensor(TOKENS)[None]
    embedded = text.embed_tokens(tokens)
    given = text.get_per_layer_inputs(tokens, embedded)
    return text.project_per_layer_inputs(embedded, given)[0, :, layer]


@pytest.mark.parametrize("architecture", MAKERS)
def test_resid_post_is_what_transformers_calls_a_hidden_state(
    architecture: str, folders: dict[str, Path]
):
    model = load_oracle(folders[architecture])
    wanted = model(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False)
    (post,), logits = hidden_and_logits(model, TOKENS, Site(1))
    np.testing.assert_allclose(post, wanted.hidden_states[2][0], atol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits[0], atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_inner_sites_stand_where_their_names_say(architecture: str, folders: dict[str, Path]):
    model = load_oracle(folders[architecture])
    block = model.model.layers[1]
    kinds = ("attn_z", "attn_raw", "mlp_in", "mlp_raw", "mlp_in_unscaled", "resid_mid", "mlp_out")
    sites = [Site(1, kind) for kind in kinds]
    (z, attn, mlp_in, mlp, unscaled, mid, mlp_out), _ = hidden_and_logits(model, TOKENS, *sites)
    np.testing.assert_allclose(block.self_attn.o_proj(z), attn, atol=1e-12)
    np.testing.assert_allclose(block.mlp(mlp_in), mlp, atol=1e-12)
    rms = torch.sqrt((mid**2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    np.testing.assert_allclose(unscaled, mid / rms, atol=1e-12)
    if architecture == "llama":
        gain, added = block.post_attention_layernorm.weight, mlp
    else:
        gain = 1 + block.pre_feedforward_layernorm.weight
        rms = torch.sqrt((mlp**2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
        added = mlp / rms * (1 + block.post_feedforward_layernorm.weight)
    np.testing.assert_allclose(unscaled * gain, mlp_in, atol=1e-12)
    np.testing.assert_allclose(mlp_out, added, atol=1e-12)


# LoRA and gradients -------------------------------------------------------------------------------


def adapters_for(keys: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(seed), {}
    for path, (size_in, size_out) in keys.items():
        arrays[f"{path}.lora_a"] = rng.normal(size=(size_in, 3)) / size_in**0.5
        arrays[f"{path}.lora_b"] = 0.02 * rng.normal(size=(3, size_out))
    return arrays


KEYS = {
    "model.layers.0.self_attn.v_proj": (HIDDEN, 16),
    "model.layers.1.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.1.mlp.down_proj": (48, HIDDEN),
}


def test_lora_is_a_low_rank_addition_to_the_weight(tmp_path: Path):
    arrays = adapters_for(KEYS)
    adapted, merged = load_oracle(tiny_llama(tmp_path)), load_oracle(tmp_path)
    _, plain = hidden_and_logits(adapted, TOKENS)
    attach_lora(adapted, arrays, scale=4.0)
    for path in KEYS:
        delta = 4.0 * (arrays[f"{path}.lora_a"] @ arrays[f"{path}.lora_b"]).T
        merged.get_submodule(path).weight.data += torch.tensor(delta)
    _, got = hidden_and_logits(adapted, TOKENS)
    _, wanted = hidden_and_logits(merged, TOKENS)
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-10)
    assert (got - plain).abs().max() > 0.01
    with adapters_off(adapted):
        _, off = hidden_and_logits(adapted, TOKENS)
    np.testing.assert_array_equal(off, plain)


@pytest.mark.parametrize(
    ("architecture", "path", "size_out"),
    [
        ("gpt2", "model.h.1.attn.c_attn", 96),
        ("gpt_neox", "model.h.1.attention.query_key_value", 96),
        ("phi3", "model.layers.1.self_attn.qkv_proj", 64),
    ],
)
def test_lora_finds_a_module_by_the_name_mlx_lm_gives_it(architecture, path, size_out, folders):
    model = load_oracle(folders[architecture])
    before, _ = hidden_and_logits(model, TOKENS, Site(0), Site(1))
    attach_lora(model, adapters_for({path: (HIDDEN, size_out)}))
    after, _ = hidden_and_logits(model, TOKENS, Site(0), Site(1))
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-3


def random_sae(size: int = 64) -> SaeWeights:
    rng = np.random.default_rng(3)
    return SaeWeights(
        "jumprelu",
        (rng.normal(size=(HIDDEN, size)) / HIDDEN**0.5).astype(np.float32),
        (0.3 * rng.normal(size=size)).astype(np.float32),
        threshold=np.full(size, 0.2, np.float32),
        site=Site(2),
    )


PAIRS = [
    TokenPair(np.array([5, 17, 3]), np.array([8, 120, 44, 61]), np.array([9, 2]), 0),
    TokenPair(np.array([200]), np.array([31]), np.array([90, 91, 92, 93, 94]), 1),
]


@pytest.mark.parametrize("name", ["fpo", "dpo", "simpo", "simpo-kl", "tdpo1", "tdpo2"])
def test_a_fresh_adapter_changes_nothing_yet_has_a_gradient(name: str, tmp_path: Path):
    arrays = {k: 0 * v if k.endswith("b") else v for k, v in adapters_for(KEYS).items()}
    model = load_oracle(tiny_llama(tmp_path))
    adapters = attach_lora(model, arrays)
    results, grads = loss_and_grads(model, adapters, PAIRS, preset(name), [random_sae()])
    for parts in results:
        if "simpo" not in name:
            assert parts["u"] == pytest.approx(0, abs=1e-12)
            assert parts["loss"] == pytest.approx(math.log(2), rel=1e-12)
        assert parts["delta"] == parts["kl/rejected"] == parts["rewards/chosen"] == 0
    for key, grad in grads.items():
        assert np.abs(grad).max() > 1e-3 if key.endswith("b") else not grad.any()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
@pytest.mark.parametrize(
    "setup",
    [
        preset("fpo", k=8, alpha=5.0),
        preset("fpo", k=8, alpha=5.0, stop_gradient=False, feature_scale="reference"),
        preset("fpo", k=8, alpha=5.0, constraint="activations"),
        preset("simpo-kl"),
        preset("tdpo1"),
        preset("tdpo2"),
    ],
    ids=["fpo", "fpo-reference-scale", "activations", "simpo-kl", "tdpo1", "tdpo2"],
)
def test_gradients_are_the_slopes_of_the_loss(make, setup: Setup, tmp_path: Path):
    """Central differences; float64 all the way, or they would be noise at this step."""
    arrays = adapters_for(KEYS)
    model = load_oracle(make(tmp_path))
    adapters = attach_lora(model, arrays, scale=2.0)
    taps = [Site(2) if setup.constraint == "activations" else random_sae()]
    base, grads = loss_and_grads(model, adapters, PAIRS, setup, taps)
    held = "kl/chosen" if setup.constraint == "kl" else "features/chosen"

    def loss_with_chosen_held() -> float:
        results, _ = loss_and_grads(model, adapters, PAIRS, setup, taps)
        losses = []
        for parts, at_base in zip(results, base, strict=True):
            moved = (parts[held] - at_base[held]) if setup.stop_gradient else 0.0
            u = parts["u"] - setup.alpha * setup.beta * moved
            losses.append(math.log1p(math.exp(-u)))
        return float(np.mean(losses))

    rng, step, slope = np.random.default_rng(1), 1e-5, 0.0
    # one random direction through all matrices at once: an error in any of them turns the slope
    moves = {name: torch.tensor(rng.normal(size=p.shape)) for name, p in adapters.items()}
    for sign in (1, -1):
        for name, parameter in adapters.items():
            parameter.data += sign * step * moves[name]
        slope += sign * loss_with_chosen_held() / (2 * step)
        for name, parameter in adapters.items():
            parameter.data -= sign * step * moves[name]
    wanted = sum(float((torch.tensor(grads[name]) * moves[name]).sum()) for name in adapters)
    assert abs(wanted) > 1e-3
    assert slope == pytest.approx(wanted, rel=1e-5)


def test_the_loss_is_the_mean_over_pairs(tmp_path: Path):
    model = load_oracle(tiny_llama(tmp_path))
    adapters = attach_lora(model, adapters_for(KEYS))
    both, grads = loss_and_grads(model, adapters, PAIRS, preset("fpo"), [random_sae()])
    alone = [loss_and_grads(model, adapters, [p], preset("fpo"), [random_sae()]) for p in PAIRS]
    assert [one[0][0] for one in alone] == both
    assert both[0]["u"] != both[1]["u"]
    for name in grads:
        mean = (alone[0][1][name] + alone[1][1][name]) / 2
        np.testing.assert_allclose(grads[name], mean, rtol=1e-10, atol=1e-14)
