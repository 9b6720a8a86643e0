"""Adapter folders: what training writes, mlx-lm reads, and the other way round."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import SIZES, logits_of, open_trainer, random_adapters, random_pairs  # noqa: E402
from mlx_lm import utils  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from quantised import quantised  # noqa: E402, F401

from fpo_mlx.errors import ConfigError, ModelError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402

TOKENS = [5, 17, 250, 3, 99, 42]
PAIRS = random_pairs(SIZES[:4])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    out = {}
    for name in ("llama", "gemma2"):
        size = {} if name == "llama" else {"head_dim": 8}
        # quantisation takes rows in groups of 32: the MLP's 48 does not divide
        out[name, "float"] = tiny_models.MAKERS[name](
            root / name, tokenizer=True, intermediate_size=64, **size
        )
        out[name, "4 bits"] = quantised(out[name, "float"], root / f"{name}-4bit")
    return out


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["float", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_mlx_lm_loads_the_trained_policy(folders, tmp_path, family, base, kind):
    folder = folders[family, base]
    trainer = open_trainer(folder, tmp_path, PAIRS, fine_tune_type=kind, iters=3)
    list(trainer.run())
    want = logits_of(trainer.model, TOKENS)
    model, _ = utils.load(str(folder), adapter_path=str(tmp_path))
    got = logits_of(model, TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-3 if base == "4 bits" else 1e-4)
    plain = logits_of(utils.load_model(folder)[0], TOKENS)
    assert np.abs(got - plain).max() > 0.02, "the adapters change nothing"
    bare = utils.load_adapters(utils.load_model(folder)[0], str(tmp_path))
    bare.eval()
    np.testing.assert_allclose(logits_of(bare, TOKENS), got, atol=1e-6)


@pytest.mark.parametrize(("dropout", "swapped"), [(0.0, True), (0.5, False)])
def test_an_adapted_layer_is_mlx_lms_own_in_value_and_gradient(folders, dropout, swapped):
    model = load_model(folders["llama", "float"]).model
    path = "model.layers.1.mlp.up_proj"
    adapters.attach(model, adapters.AdapterSpec("lora", 3, 4, 7.0, dropout, (path,)))
    layer = model.layers[1].mlp.up_proj
    assert (type(layer) is not LoRALinear) is swapped
    model.eval()
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    x = mx.random.normal((2, 3, layer.lora_a.shape[0]), key=mx.random.key(2))
    cotangent = mx.random.normal((2, 3, layer.lora_b.shape[1]), key=mx.random.key(3))

    def total(call):
        def loss(x, a, b):
            layer.lora_a, layer.lora_b = a, b
            y = call(layer, x)
            return (y * cotangent).sum(), y

        return mx.value_and_grad(loss, argnums=(0, 1, 2))(x, layer.lora_a, layer.lora_b)

    a, b = layer.lora_a, layer.lora_b
    (_, got), got_slopes = total(type(layer).__call__)
    layer.lora_a, layer.lora_b = a, b
    (_, want), want_slopes = total(LoRALinear.__call__)
    for one, other in zip((got, *got_slopes), (want, *want_slopes), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_file_holds_float32_adapter_leaves_only(folders, tmp_path, kind):
    trainer = open_trainer(
        folders["llama", "4 bits"], tmp_path, PAIRS, fine_tune_type=kind, iters=1
    )
    list(trainer.run())
    weights = mx.load(str(tmp_path / "adapters.safetensors"))
    leaves = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    assert {name.rpartition(".")[2] for name in weights} == leaves
    assert {array.dtype for array in weights.values()} == {mx.float32}
    assert len(weights) == len(leaves) * 2 * 3  # two blocks, three layers each


def test_layers_count_back_from_the_deepest_block_that_is_adapted(folders):
    model = load_model(folders["llama", "float"]).model
    n, paths = adapters.adapted_paths(model, 2, 2, ["self_attn.q_proj"])
    assert (n, paths) == (
        2, ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"),
    )  # fmt: skip
    assert adapters.adapted_paths(model, None, 2, ["mlp.up_proj"])[0] == 3
    n, paths = adapters.adapted_paths(model, -1, 3, None)
    assert n == 4
    assert len(paths) == 4 * 7  # q k v o, gate up down
    _, full = adapters.adapted_paths(model, 4, 3, ["model.layers.3.mlp.up_proj"])
    assert full == ("model.layers.3.mlp.up_proj",)


@pytest.mark.parametrize("n", [0, 4, -2])
def test_more_blocks_than_there_are_is_refused(folders, n):
    model = load_model(folders["llama", "float"]).model
    with pytest.raises(ConfigError, match="there are 3 blocks up to block 2"):
        adapters.adapted_paths(model, n, 2, None)


@pytest.mark.parametrize("keys", [["self_attn.nothing"], []])
def test_keys_that_match_nothing_are_refused(folders, keys):
    model = load_model(folders["llama", "float"]).model
    with pytest.raises(ConfigError, match="match no layer"):
        adapters.adapted_paths(model, 2, 2, keys)


@pytest.mark.parametrize(
    "key", ["lm_head", "model.embed_tokens", "self_attn.vproj", "model.layers.0.mlp.up_proj"]
)
def test_a_key_that_matches_nothing_is_refused_beside_one_that_does(folders, key):
    """It was dropped, and nothing was said of it."""
    model = load_model(folders["llama", "float"]).model
    said = rf"keys: {key} match no layer of blocks 1 to 2\. "
    other = key == "model.layers.0.mlp.up_proj"
    said += r"They lie in other blocks.*--num-layers" if other else r".*self_attn\.v_proj"
    with pytest.raises(ConfigError, match=said):
        adapters.adapted_paths(model, 2, 2, ["self_attn.q_proj", key])


def test_a_key_of_blocks_of_another_kind_may_match_none_that_are_adapted(folders):
    """Hybrid models: an attention in every fourth block."""
    model = load_model(folders["llama", "float"]).model
    del model.layers[2].self_attn["v_proj"]
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    assert adapters.adapted_paths(model, 1, 2, keys) == (1, ("model.layers.2.self_attn.q_proj",))


def test_blocks_of_modules_are_known(folders):
    blocks = adapters.block_of(load_model(folders["llama", "float"]).model)
    assert blocks["model.layers.3.mlp.up_proj"] == 3
    assert "lm_head" not in blocks


@pytest.mark.parametrize("keys", [["self_attn.q_proj", "mlp.up_proj"], None])
@pytest.mark.parametrize("n", [2, -1])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_mlx_lm_are_read_back(folders, tmp_path, keys, n, kind):
    """Its keys are relative to a block, or absent, which means every layer."""
    folder = folders["llama", "float"]
    model, _ = utils.load_model(folder)
    lora = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    model.freeze()
    linear_to_lora_layers(model, n, lora, use_dora=kind == "dora")
    adapters.update(model, {k: mx.array(v) for k, v in random_adapters(model).items()})
    adapters.save(tmp_path / "adapters.safetensors", dict(adapters.parameters(model)))
    config = {"num_layers": n, "lora_parameters": lora, "fine_tune_type": kind}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = load_model(folder).model
    spec = adapters.load(ours, tmp_path)
    ours.eval()
    assert (spec.rank, spec.scale, spec.fine_tune_type) == (4, 3.0, kind)
    assert len(spec.keys) == (2 if n == 2 else 4) * (2 if keys else 7)
    np.testing.assert_allclose(logits_of(ours, TOKENS), logits_of(model, TOKENS), atol=1e-5)
    assert np.abs(logits_of(ours, TOKENS) - logits_of(load_model(folder).model, TOKENS)).max() > 0.1


def mlx_lms(folder, out, keys):
    """An adapter as mlx_lm.lora makes and writes it, its keys as they were given; the model."""
    model, _ = utils.load_model(folder)
    lora = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    model.freeze()
    linear_to_lora_layers(model, 2, lora)
    adapters.update(model, {k: mx.array(v) for k, v in random_adapters(model).items()})
    adapters.save(out / "adapters.safetensors", dict(adapters.parameters(model)))
    config = {"num_layers": 2, "lora_parameters": lora, "fine_tune_type": "lora"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("outside", ["lm_head", "model.embed_tokens"])
def test_layers_outside_the_blocks_that_mlx_lm_adapted_are_read_back(folders, tmp_path, outside):
    theirs = mlx_lms(folders["llama", "float"], tmp_path, ["self_attn.q_proj", outside])
    ours = load_model(folders["llama", "float"]).model
    spec = adapters.load(ours, tmp_path)
    ours.eval()
    inside = [f"model.layers.{at}.self_attn.q_proj" for at in (2, 3)]
    assert spec.keys == tuple(sorted([outside, *inside]))
    np.testing.assert_allclose(logits_of(ours, TOKENS), logits_of(theirs, TOKENS), atol=1e-5)


def test_tensors_that_an_adapter_lacks_and_layers_that_the_model_lacks_are_named(folders, tmp_path):
    mlx_lms(folders["llama", "float"], tmp_path, ["self_attn.q_proj"])
    path = tmp_path / "adapters.safetensors"
    whole = mx.load(str(path))
    adapters.save(path, {k: v for k, v in whole.items() if "layers.2" not in k})
    with pytest.raises(ModelError, match=r"2\.self_attn\.q_proj\.lora_a: missing"):
        adapters.load(load_model(folders["llama", "float"]).model, tmp_path)
    more = {k.replace("layers.3", "layers.9"): v for k, v in whole.items()}
    adapters.save(path, whole | more)
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.9\.self_attn\.q_proj \(1"):
        adapters.load(load_model(folders["llama", "float"]).model, tmp_path)


def test_frozen_weights_do_not_become_trainable_by_loading(folders, tmp_path):
    trainer = open_trainer(folders["llama", "float"], tmp_path, PAIRS, iters=1)
    list(trainer.run())
    model = load_model(folders["llama", "float"]).model
    adapters.load(model, tmp_path)
    names = {name for name, _ in nn.utils.tree_flatten(model.trainable_parameters())}
    assert names == {name for name, _ in adapters.parameters(model)}


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    list(open_trainer(folders["llama", "float"], out, PAIRS, iters=1).run())
    return out


DAMAGE = {
    "no folder": (lambda config: None, "found no adapter_config.json"),
    "full": (lambda config: config | {"fine_tune_type": "full"}, "wanted lora or dora"),
    "no rank": (lambda config: config | {"lora_parameters": {}}, "not an adapter configuration"),
    "a list": (lambda config: [1], "not an adapter configuration"),
    "no keys": (lambda config: config | {"lora_parameters": {
        **config["lora_parameters"], "keys": 3}}, "not an adapter configuration"),
    "rank": (lambda config: config | {"lora_parameters": {
        **config["lora_parameters"], "rank": 9}}, r"does not fit the model \(12 faults\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_an_adapter_folder_that_does_not_fit_is_a_plain_error(folders, tmp_path, written, name):
    change, message = DAMAGE[name]
    config = change(json.loads((written / "adapter_config.json").read_text()))
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapters.safetensors").write_bytes((written / "adapters.safetensors").read_bytes())
    with pytest.raises(ModelError, match=message):
        adapters.load(load_model(folders["llama", "float"]).model, tmp_path)


@pytest.mark.parametrize("cut", [0, 50, -100])
def test_adapter_weights_cut_short_are_a_plain_error(folders, tmp_path, written, cut):
    (tmp_path / "adapter_config.json").write_text((written / "adapter_config.json").read_text())
    whole = (written / "adapters.safetensors").read_bytes()
    (tmp_path / "adapters.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        adapters.load(load_model(folders["llama", "float"]).model, tmp_path)


@pytest.mark.parametrize("training", [False, True])
def test_adapters_are_put_on_in_the_mode_of_the_model(folders, training):
    """A dropout in layers that were put on a model that only reads would be measured with it."""
    model = load_model(folders["llama", "float"]).model
    model.train(training)
    spec = adapters.AdapterSpec("lora", 3, 4, 7.0, 0.5, ("model.layers.1.mlp.up_proj",))
    adapters.attach(model, spec)
    assert {module.training for module in model.modules()} == {training}
