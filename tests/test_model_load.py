"""Loading, backbone and head, and the taps, on every architecture that the fixtures know."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import logits_of, random_pairs  # noqa: E402
from mlx_lm import utils  # noqa: E402
from test_adapters import quantised  # noqa: E402

from fpo_mlx.core.vocabulary import LinearHead  # noqa: E402
from fpo_mlx.errors import ModelError, SaeError  # noqa: E402
from fpo_mlx.model.heads import ReplayedHead, find_backbone, find_head, split  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.model.policy import Policy, has_plain_caches  # noqa: E402
from fpo_mlx.records import SITE_KINDS, Site  # noqa: E402

FAMILIES = list(tiny_models.MAKERS)
PAIRS = random_pairs([(12, 5, 8), (3, 7, 7), (1, 4, 2)])
# attention and MLP run side by side there: no tensor of the forward pass lies between them
NOT_TAPPED = {("cohere2", "resid_mid"), ("gpt_neox", "resid_mid")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("families"), {}

    def of(family):
        if family not in cache:
            cache[family] = tiny_models.MAKERS[family](root / family)
        return cache[family]

    return of


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_keeps_its_numbers_on_the_cpu(folders, tmp_path, family, bits):
    settings = {"moe_intermediate_size": 64} if family == "qwen2_moe" else {}
    whole = tiny_models.MAKERS[family](tmp_path / "float", intermediate_size=64, **settings)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_once_equals_whole_sequences_on_every_family(folders, family):
    """Windows of 6 tokens (gemma3, cohere2) are crossed within prompts and responses."""
    rows = []
    for share in (True, False):
        loaded = load_model(folders(family))
        sites = [Site(1), Site(3, "resid_pre")]
        policy = Policy(loaded.model, loaded.config, sites, share_prompt=share)
        assert policy.shares_prompt is (share and has_plain_caches(loaded.model))
        seen = policy.rows(PAIRS)
        rows.append([np.array(a) for a in (seen.hidden, *seen.tapped)])
    for once, plain in zip(*rows, strict=True):
        assert len(once) == sum(len(p.chosen) + len(p.rejected) for p in PAIRS)
        np.testing.assert_allclose(once, plain, atol=2e-5 * max(1, np.abs(plain).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_the_oracles(folders, family):
    """All site kinds at once, on the middle blocks; refused where a family has no such place."""
    truth = oracle.load_oracle(folders(family))
    loaded = load_model(folders(family))
    pair, compared = PAIRS[0], 0
    slow = family in ("mixtral", "qwen2_moe")  # float64 experts
    sequence = [*pair.prompt, *pair.chosen]
    rows = slice(len(pair.prompt) - 1, len(sequence) - 1)
    for kind in SITE_KINDS:
        for layer in (2,) if slow else (0, 2):
            site = Site(layer, kind)
            try:
                (want,), _ = oracle.hidden_and_logits(truth, sequence, site)
            except (NotImplementedError, StopIteration):
                continue
            try:
                policy = Policy(loaded.model, loaded.config, [site])
            except ModelError:
                assert (family, kind) in NOT_TAPPED
                continue
            got = np.array(policy.rows([pair]).tapped[0])[: len(pair.chosen)]
            want = want[rows].detach().numpy()
            size = max(1.0, np.abs(want).max())
            np.testing.assert_allclose(got, want, atol=1e-4 * size, err_msg=str(site))
            compared += 1
    assert compared >= (7 if slow else 14)


def test_a_site_beyond_the_model_is_refused(folders):
    loaded = load_model(folders("llama"))
    with pytest.raises(SaeError, match="blocks are 0 to 3"):
        Policy(loaded.model, loaded.config, [Site(4)])
