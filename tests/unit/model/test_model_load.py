"""Loading, backbone and head, and the taps, on every architecture that the fixtures know."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import logits_of, random_pairs  # noqa: E402
from mlx_lm import utils  # noqa: E402
from mlx_lm.models import falcon_h1, gemma3n  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchLinear  # noqa: E402
from quantised import LATENT, quantised  # noqa: E402

from fpo_mlx.core.vocabulary import LinearHead  # noqa: E402
from fpo_mlx.errors import ModelError, SaeError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.heads import ReplayedHead, find_backbone, find_head, split  # noqa: E402
from fpo_mlx.model.load import dequantize, load_model  # noqa: E402
from fpo_mlx.model.policy import Policy, plain_caches  # noqa: E402
from fpo_mlx.model.taps import Tap, tap_point  # noqa: E402
from fpo_mlx.model.trees import arrays_of, blocks_of  # noqa: E402
from fpo_mlx.records import Site  # noqa: E402
from fpo_mlx.sae.check import z_widths  # noqa: E402
from fpo_mlx.saetrain.activations import open_reader  # noqa: E402
from fpo_mlx.saetrain.texts import Document  # noqa: E402
from fpo_mlx.storage.hub import read_config  # noqa: E402

FAMILIES = list(tiny_models.MAKERS)
PAIRS = random_pairs([(12, 5, 8), (3, 7, 7), (1, 4, 2)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("families"), {}

    def of(family):
        if family not in cache:
            cache[family] = tiny_models.MAKERS[family](root / family)
        return cache[family]

    return of


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_keeps_its_numbers_on_the_cpu(tmp_path, family, bits):
    settings = LATENT if family == "deepseek_v3" else {"intermediate_size": 64}
    whole = tiny_models.MAKERS[family](tmp_path / "float", **settings)
    folder = quantised(whole, tmp_path / "quantised", bits)
    truth, _ = utils.load_model(folder)
    count = sum("scales" in module for _, module in truth.named_modules())
    loaded = load_model(folder)
    assert count > 10
    assert loaded.notes == (f"CPU: {count} quantised layers were dequantised to float32 at load",)
    assert not any("scales" in module for _, module in loaded.model.named_modules())
    assert loaded.dtype == "float32"
    tokens = list(range(5, 25))
    np.testing.assert_allclose(
        logits_of(loaded.model, tokens), logits_of(truth, tokens), atol=1e-3, rtol=1e-3
    )


def test_experts_with_a_scale_of_their_own_keep_it(tmp_path):
    """nvfp4: what is stored is a few hundred times larger than the weights."""
    model, experts = nn.Module(), SwitchLinear(64, 32, 3)
    model.experts = experts.to_quantized(16, 4, "nvfp4", global_scale=True)
    assert dequantize(model) == 1
    assert type(model.experts) is SwitchLinear
    np.testing.assert_array_equal(model.experts.bias, experts.bias)
    off = mx.abs(model.experts.weight - experts.weight).max()
    assert float(off) < 0.2 * float(mx.abs(experts.weight).max())


def test_a_folder_without_a_model_is_a_plain_error(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_backbone_is_the_model(folders, family):
    loaded = load_model(folders(family))
    tokens = mx.array([list(range(5, 25))])
    want = np.array(loaded.model(tokens))[0]
    backbone = find_backbone(loaded.model)
    hidden = backbone(tokens)[0]
    head = ReplayedHead(loaded.model, backbone)
    np.testing.assert_allclose(np.array(head(hidden)), want, atol=1e-5)
    some = mx.array([17, 3, 3])
    np.testing.assert_allclose(np.array(head(hidden[some])), want[[17, 3, 3]], atol=1e-5)
    np.testing.assert_array_equal(np.array(loaded.model(tokens))[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_output_projection_reads_is_known_from_the_config(folders, family):
    """Heads of their own size in Gemma 4's full attention, DeepSeek's values, linear attention."""
    loaded, config = load_model(folders(family)), read_config(folders(family))
    for layer, block in enumerate(blocks_of(loaded.model)):
        module, _ = tap_point(block, Site(layer, "attn_z"))
        assert z_widths(config, layer) == {module.weight.shape[-1]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_policy_that_is_let_go_gives_its_models_memory_back_at_once(
    folders, family, adapted, grad_checkpoint
):
    """A cycle held it until Python looked for cycles: the reference's weights through training."""
    loaded = load_model(folders(family))
    if adapted:
        n, keys = adapters.adapted_paths(loaded.model, -1, len(blocks_of(loaded.model)) - 1, None)
        adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, 2, 2.0, 0.0, keys))
    policy = Policy(loaded.model, loaded.config, [Site(1)], grad_checkpoint=grad_checkpoint)
    mx.eval(policy.rows(PAIRS[:1]).hidden)
    # mlx-lm's experts share one activation, which is a module without weights
    modules = [weakref.ref(m) for _, m in loaded.model.named_modules() if arrays_of(m.parameters())]
    gc.collect()
    gc.disable()
    try:
        del loaded, policy
        assert not any(module() is not None for module in modules)
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_head_that_is_one_matrix(folders, family):
    """With its scale and soft-cap, found by itself; the vocabulary then goes in tiles."""
    loaded = load_model(folders(family))
    tokens = mx.array([list(range(5, 25))])
    want = np.array(loaded.model(tokens))[0]
    backbone, head = split(loaded.model, loaded.config)
    hidden = backbone(tokens)[0]
    assert isinstance(head, LinearHead)
    assert hidden.shape[-1] != want.shape[-1]
    np.testing.assert_allclose(np.array(head(hidden)), want, atol=2e-5)
    np.testing.assert_array_equal(np.array(loaded.model(tokens))[0], want)  # the model as it was


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_stays_packed(folders, bits):
    loaded = load_model(folders("llama"))
    nn.quantize(loaded.model, 32, bits, class_predicate=lambda path, _: path == "lm_head")
    backbone = find_backbone(loaded.model)
    head = find_head(loaded.model, backbone, loaded.config)
    assert isinstance(head, LinearHead)
    assert head.packing is not None
    tokens = mx.array([[5, 6, 7]])
    want = np.array(loaded.model(tokens))[0]
    np.testing.assert_allclose(np.array(head(backbone(tokens)[0])), want, atol=2e-5)


def test_a_head_that_is_no_plain_matrix_is_replayed(folders):
    loaded = load_model(folders("llama"))
    own = type(loaded.model).__call__

    class Odd(type(loaded.model)):
        def __call__(self, *args, **kwargs):
            return mx.sin(own(self, *args, **kwargs))

    loaded.model.__class__ = Odd
    head = find_head(loaded.model, find_backbone(loaded.model), loaded.config)
    assert isinstance(head, ReplayedHead)


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
def test_an_output_layer_with_an_adapter_is_replayed(folders, layer):
    """A small one is within what rounding is allowed, and the bare matrix was taken for both."""
    loaded = load_model(folders("llama" if layer == "lm_head" else "qwen2"))
    adapters.attach(loaded.model, adapters.AdapterSpec("lora", 1, 4, 1.0, 0.0, (layer,)))
    head = find_head(loaded.model, find_backbone(loaded.model), loaded.config)
    assert isinstance(head, ReplayedHead)


def test_logits_that_are_minus_infinity_do_not_hide_a_scale(folders):
    """Phi-3-small divides by a number of its own, and some ids are no tokens."""
    loaded = load_model(folders("llama"))
    own = type(loaded.model).__call__

    class Masked(type(loaded.model)):
        def __call__(self, *args, **kwargs):
            out = own(self, *args, **kwargs) / 8.0
            out[..., mx.array([7, 298, 299])] = -mx.inf
            return out

    loaded.model.__class__ = Masked
    tokens = mx.array([list(range(10, 30))])
    want = np.array(loaded.model(tokens))[0]
    backbone, head = split(loaded.model, loaded.config)
    np.testing.assert_allclose(np.array(head(backbone(tokens)[0])), want, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_once_equals_whole_sequences_on_every_family(folders, family):
    """Windows of 6 tokens (gemma3, cohere2) are crossed within prompts and responses."""
    rows = []
    for share in (True, False):
        loaded = load_model(folders(family))
        sites = [Site(1), Site(3, "resid_pre")]
        policy = Policy(loaded.model, loaded.config, sites, share_prompt=share)
        assert policy.shares_prompt is (share and plain_caches(loaded.model) > 0)
        seen = policy.rows(PAIRS)
        rows.append([np.array(a) for a in (seen.hidden, *seen.tapped)])
    for once, plain in zip(*rows, strict=True):
        assert len(once) == sum(len(p.chosen) + len(p.rejected) for p in PAIRS)
        np.testing.assert_allclose(once, plain, atol=2e-5 * max(1, np.abs(plain).max()))


@pytest.mark.parametrize("family", ["cohere2", "gpt_neox"])
def test_the_middle_of_a_block_without_a_middle_is_refused(folders, family):
    loaded = load_model(folders(family))
    with pytest.raises(ModelError, match="resid_mid of block 1 cannot be tapped"):
        Policy(loaded.model, loaded.config, [Site(1, "resid_mid")])


def test_a_site_that_is_not_one_vector_a_token_is_refused(folders):
    """Gemma 3n's blocks, for one, pass several streams at once."""
    loaded = load_model(folders("llama"))
    block = loaded.model.layers[3]

    class Streams(type(block)):
        def __call__(self, *args, **kwargs):
            return mx.stack([super().__call__(*args, **kwargs)] * 2)

    block.__class__ = Streams
    policy = Policy(loaded.model, loaded.config, [Site(3)])
    with pytest.raises(ModelError, match="resid_post of block 3 .* not one vector per token"):
        policy.rows(PAIRS[:1])


def test_an_sae_is_not_trained_on_a_site_that_is_not_one_vector_a_token():
    """Told when it is opened, by every process: one that waits for rows would wait for ever."""
    with pytest.raises(ModelError, match="resid_post of block 3 .* not one vector per token"):
        open_reader(gemma_3n(), GEMMA_3N, Site(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_sae_of_the_first_block_is_trained_on_what_it_will_read(folders, family):
    """Some models ask for the cache of a block further on, which the cut took away."""
    tokens = np.arange(5, 12).astype(np.int32)
    whole, cut = load_model(folders(family)), load_model(folders(family))
    policy = Policy(whole.model, whole.config, [Site(0)])
    want = np.array(policy.answer_rows(tokens[:1], tokens[1:]).tapped[0])
    reader = open_reader(cut.model, cut.config, Site(0))
    got = reader.rows([Document(tokens, np.arange(7) < 6)])
    np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("block", [0, 1])
def test_a_model_whose_own_empty_caches_are_no_list_of_nothing_is_read_as_it_runs(block):
    """Falcon H1 looks into two caches of each block, and makes its own where it gets none."""
    args = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 300}
    args |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    args |= {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_n_heads": 4, "mamba_d_state": 8}
    whole = falcon_h1.Model(falcon_h1.ModelArgs(**args))
    tokens = np.arange(5, 12).astype(np.int32)
    tap = Tap(*tap_point(blocks_of(whole)[block], Site(block)))
    with tap.recording() as seen:
        whole(mx.array(tokens[None]))
    want = np.array(seen[-1])[0, 1:]
    reader = open_reader(whole, {"rms_norm_eps": 1e-5}, Site(block))
    got = reader.rows([Document(tokens, np.arange(7) > 0)])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_an_sae_is_trained_with_the_norm_that_a_wrapper_names_for_its_language_model(folders):
    text = {"rms_norm_eps": 0.5, "residual_multiplier": 0.7}
    model = load_model(folders("llama")).model
    reader = open_reader(model, {"text_config": text}, Site(1))
    assert (reader.eps, reader.residual) == (0.5, 0.7)


def test_a_wrapper_whose_files_leave_the_vocabulary_out_is_read(folders):
    """As published for Gemma 3: neither level of config.json has vocab_size."""
    loaded = load_model(folders("gemma3"))
    text = {k: v for k, v in loaded.config["text_config"].items() if k != "vocab_size"}
    config = {"model_type": "gemma3", "text_config": text | {"rms_norm_eps": 1e-5}}
    policy = Policy(loaded.model, config)
    assert policy.vocab_size == 300
    assert isinstance(policy.head, LinearHead)
    assert policy.norm_eps == 1e-5


def test_a_site_beyond_the_model_is_refused(folders):
    loaded = load_model(folders("llama"))
    with pytest.raises(SaeError, match="blocks are 0 to 3"):
        Policy(loaded.model, loaded.config, [Site(4)])


GEMMA_3N = {
    "model_type": "gemma3n_text", "hidden_size": 32, "num_hidden_layers": 6,
    "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-6,
    "vocab_size": 300, "num_key_value_heads": 2, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 300, "sliding_window": 6, "max_position_embeddings": 512,
    "rope_local_base_freq": 1e4, "rope_theta": 4e4, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "activation_sparsity_pattern": [0.0] * 6, "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True,
    "altup_active_idx": 0, "laurel_rank": 4,
}  # fmt: skip


def gemma_3n():
    """Its blocks 4 and 5 use the keys and values of 2 and 3, which mlx-lm finds in caches."""
    mx.random.seed(0)
    return gemma3n.Model(gemma3n.ModelArgs("gemma3n", GEMMA_3N))


@pytest.mark.parametrize("share", [True, False])
def test_gemma_3n_is_scored_as_it_generates(share):
    model = gemma_3n()
    policy = Policy(model, {"text_config": GEMMA_3N}, share_prompt=share)
    assert policy.shares_prompt is share
    pair = PAIRS[0]
    got = np.array(policy.head(policy.rows([pair]).hidden))[: len(pair.chosen)]
    tokens = mx.array(np.concatenate([pair.prompt, pair.chosen[:-1]]))[None]
    want = np.array(model(tokens, cache=make_prompt_cache(model)))[0, len(pair.prompt) - 1 :]
    np.testing.assert_allclose(got, want, atol=1e-5)
    without = np.array(model(tokens))[0, len(pair.prompt) - 1 :]
    assert np.abs(without - want).max() > 0.1, "then the caches would not matter"


@pytest.mark.parametrize("block", [3, 5])
def test_gemma_3n_shows_the_same_activations_of_an_answer_alone_and_beside_another(block):
    policy = Policy(gemma_3n(), {"text_config": GEMMA_3N}, [Site(block, "mlp_raw")])
    assert policy.shares_prompt
    pair = PAIRS[0]
    together = np.array(policy.rows([pair]).tapped[0])
    alone = [policy.answer_rows(pair.prompt, one).tapped[0] for one in pair.responses]
    np.testing.assert_allclose(np.concatenate(alone), together, atol=1e-5)


@pytest.mark.parametrize("block", [3, 5])
def test_an_sae_of_gemma_3n_is_trained_on_what_it_will_read(block):
    site, pair = Site(block, "mlp_raw"), PAIRS[0]
    policy = Policy(gemma_3n(), {"text_config": GEMMA_3N}, [site])
    first, tokens = len(pair.prompt) - 1, np.concatenate([pair.prompt, pair.chosen[:-1]])
    reader = open_reader(gemma_3n(), GEMMA_3N, site)
    got = reader.rows([Document(tokens, np.arange(len(tokens)) >= first)])
    want = np.array(policy.rows([pair]).tapped[0])[: len(pair.chosen)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_gradient_through_one_answer_of_gemma_3n_is_that_of_the_plain_pass_when_recomputed():
    """It reaches the keys of block 3, and not those of block 5, which the model leaves unused."""
    pair, grads = PAIRS[0], []
    for checkpoint in (False, True):
        model = gemma_3n()
        model.freeze()
        for block in (3, 5):
            blocks_of(model)[block].self_attn.k_proj.unfreeze()
        policy = Policy(model, {"text_config": GEMMA_3N}, grad_checkpoint=checkpoint)

        def total(policy=policy):
            return policy.answer_rows(pair.prompt, pair.chosen).hidden.square().sum()

        tree = nn.value_and_grad(model, total)()[1]
        grads.append([np.array(array) for _, array in nn.utils.tree_flatten(tree)])
    (used, unused), (again, _) = grads
    assert np.abs(used).max() > 0
    assert not unused.any()
    np.testing.assert_allclose(again, used, atol=1e-5 * np.abs(used).max())
