"""Which layers an SAE's site sees nothing of: by their names here, by changing them in truth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from architectures import sites_of  # noqa: E402

from fpo_mlx.errors import ConfigError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.model.taps import Tap, tap_point  # noqa: E402
from fpo_mlx.model.trees import blocks_of, module_at  # noqa: E402
from fpo_mlx.pipeline import policy  # noqa: E402
from fpo_mlx.records import Site  # noqa: E402

BLOCK = 1
FAMILIES = [
    "llama", "gemma2", "olmo2", "granite", "phi3", "gpt2", "mixtral", "qwen2_moe", "gpt_oss",
    "gemma4_text", "cohere2", "gpt_neox",
]  # fmt: skip
PARALLEL = {"cohere2", "gpt_neox"}  # the MLP reads what attention reads, which no name says


def values_at(model: Any, sites: list[Site]) -> dict[Site, np.ndarray]:
    found = {}
    for site in sites:
        block = blocks_of(model)[site.layer]
        module, port = tap_point(block, site)
        plain = type(module)
        tap = Tap(module, port)
        with tap.recording() as seen:
            model(mx.array([[5, 17, 250, 3, 99, 42]]))
        module.__class__ = plain
        found[site] = np.array(seen[0])
    return found


def changed_by(model: Any, path: str, sites: list[Site], before: dict) -> set[Site]:
    """The sites that hold something else when this layer's weights are others."""
    layer = module_at(model, path)
    weight = layer.weight
    noise = mx.random.normal(weight.shape, key=mx.random.key(1)) * mx.abs(weight).max()
    layer.weight = weight + noise
    after = values_at(model, sites)
    layer.weight = weight
    return {site for site in sites if not np.array_equal(before[site], after[site])}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_site_does_not_see_is_what_cannot_change_it(family, tmp_path):
    model = load_model(tiny_models.MAKERS[family](tmp_path / "model")).model
    sites = [site for site in sites_of(model) if site.layer == BLOCK]
    _, paths = adapters.adapted_paths(model, -1, BLOCK + 1, None)
    before = values_at(model, sites)
    unseen = {site: adapters.unseen(model, [site]) for site in sites}
    for path in paths:
        seen_by = changed_by(model, path, sites, before)
        claimed = {site for site in sites if path not in unseen[site]}
        assert seen_by <= claimed, f"{path} is called unseen, and is seen"
        if family not in PARALLEL:
            assert seen_by == claimed, path


def test_of_several_sites_one_that_sees_a_layer_is_enough(tmp_path):
    model = load_model(tiny_models.MAKERS["llama"](tmp_path / "model")).model
    block = {key for key, layer in adapters.block_of(model).items() if layer == 2}
    both = [Site(2, "attn_z"), Site(2, "mlp_out")]
    assert adapters.unseen(model, both[:1]) & block >= {"model.layers.2.mlp.down_proj"}
    assert not adapters.unseen(model, both) & block
    assert not adapters.unseen(model, [Site(2, "attn_z"), Site(3, "resid_pre")]) & block
    assert adapters.unseen(model, []) == set()


@pytest.mark.parametrize(
    ("site", "key", "want"),
    [
        (Site(1), "model.layers.1.mlp.down_proj", False),
        (Site(1), "model.layers.2.self_attn.q_proj", True),
        (Site(2, "resid_pre"), "model.layers.2.self_attn.q_proj", True),
        (Site(2, "resid_pre"), "model.layers.1.mlp.down_proj", False),
        (Site(2, "mlp_out"), "model.layers.2.mlp.down_proj", False),
        (Site(2, "mlp_in"), "model.layers.2.mlp.down_proj", True),
        (Site(2, "attn_out"), "model.layers.2.self_attn.o_proj", False),
        (Site(2, "attn_z"), "model.layers.2.self_attn.o_proj", True),
        (Site(2, "attn_z"), "model.layers.2.self_attn.v_proj", False),
        (Site(2, "attn_z"), "model.layers.1.mlp.down_proj", False),
    ],
)
def test_adapters_above_every_site_cannot_move_the_constraint(site, key, want, tmp_path):
    model = load_model(tiny_models.MAKERS["llama"](tmp_path / "model")).model
    assert (key in adapters.unseen(model, [site])) is want


def test_of_several_saes_the_one_out_of_reach_is_named(tmp_path, monkeypatch):
    model = load_model(tiny_models.MAKERS["llama"](tmp_path / "model")).model
    monkeypatch.setattr(policy, "_sites", lambda job: [Site(3), Site(1)])
    spec = SimpleNamespace(keys=["model.layers.2.mlp.down_proj"])
    with pytest.raises(ConfigError, match="it reads the resid_post of block 1"):
        policy.check_reach(None, model, spec)
