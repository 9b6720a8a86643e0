"""Adapters of PEFT and of older mlx-lm: read as what they are, written so that PEFT reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import logits_of, random_adapters  # noqa: E402
from mlx_lm import utils  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from fpo_mlx.errors import ModelError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.pipeline.origins import warn_of_origin  # noqa: E402
from fpo_mlx.reference.weights import adapter_fingerprint  # noqa: E402
from fpo_mlx.storage.adapter_files import public_name, read_adapter  # noqa: E402

TOKENS = [5, 17, 250, 3, 99, 42]
PATHS = ("model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("model"), tokenizer=True)


def peft(target, weights, ranks=(4, 4), **config):
    """A PEFT folder with random factors; what each layer's weight becomes, by PEFT's formulas."""
    target.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", **config}
    rng, tensors, wanted = np.random.default_rng(0), {}, {}
    for path, r in zip(PATHS, ranks, strict=True):
        w = weights[f"{path}.weight"]
        a = rng.normal(size=(r, w.shape[1])).astype(np.float32) * 0.2
        b = rng.normal(size=(w.shape[0], r)).astype(np.float32) * 0.2
        alpha = config.get("alpha_pattern", {}).get(path.rpartition(".")[2], config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        new = w + scale * b @ a
        name = f"base_model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if config.get("use_dora"):
            m = np.abs(rng.normal(size=len(w))).astype(np.float32) + 1
            tensors[f"{name}.lora_magnitude_vector"] = m
            new = (m / np.linalg.norm(new, axis=1))[:, None] * new
        wanted[f"{path}.weight"] = new
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config))
    return wanted


def oracle(folder, wanted):
    """Logits of the model with these weights put in."""
    model = load_model(folder).model
    model.load_weights([(k, mx.array(v)) for k, v in wanted.items()], strict=False)
    return logits_of(model, TOKENS)


FORMS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "other ranks": {"ranks": (4, 2), "rank_pattern": {"down_proj": 2}},
    "other alphas": {"alpha_pattern": {"down_proj": 5}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_peft_adapter_gives_the_weights_of_pefts_own_formula(folder, tmp_path, form):
    wanted = peft(tmp_path / "p", load_file(folder / "model.safetensors"), **FORMS[form])
    model = load_model(folder).model
    spec = adapters.load(model, tmp_path / "p")
    model.eval()
    assert spec.keys == PATHS
    assert spec.num_layers == 3  # counted back to block 1 of four
    got = logits_of(model, TOKENS)
    np.testing.assert_allclose(got, oracle(folder, wanted), atol=1e-4)
    assert np.abs(got - logits_of(load_model(folder).model, TOKENS)).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_torch_backend_merges_the_same_peft_adapter(folder, tmp_path, form):
    torch = pytest.importorskip("torch")
    from fpo_mlx.reference.torch_backend import load

    wanted = peft(tmp_path / "p", load_file(folder / "model.safetensors"), **FORMS[form])
    model, _ = load.load_model(folder, tmp_path / "p", torch.device("cpu"), torch.float32)
    got = dict(model.named_parameters())
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name].detach().numpy(), array, atol=1e-5)


BEYOND = {
    "another method": ({"peft_type": "IA3"}, "PEFT adapter of the kind IA3"),
    "biases": ({"bias": "lora_only"}, "PEFT adapter with bias: lora_only"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "PEFT adapter with modules_to_save"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_mlx_lms_layers_cannot_express_is_refused_by_name(folder, tmp_path, name):
    config, message = BEYOND[name]
    peft(tmp_path / "p", load_file(folder / "model.safetensors"), **config)
    with pytest.raises(ModelError, match=message):
        adapters.load(load_model(folder).model, tmp_path / "p")


def with_more(place, prefix):
    """A PEFT folder of a multimodal model: the same layers once more under another name."""
    path = place / "adapter_model.safetensors"
    tensors = load_file(path)
    names = {k: k.replace("model.model.", f"model.model.{prefix}") for k in tensors}
    save_file(tensors | {names[k]: v[:, ::-1].copy() for k, v in tensors.items()}, path)


@pytest.mark.parametrize("prefix", ["vision_tower.encoder.", "visual.", "audio_tower."])
def test_layers_of_a_tower_are_left_out_and_never_taken_for_those_of_the_text(
    folder, tmp_path, prefix
):
    """target_modules [q_proj] hits the vision tower of Gemma 3, too, block by block."""
    wanted = peft(tmp_path / "p", load_file(folder / "model.safetensors"))
    with_more(tmp_path / "p", prefix)
    model = load_model(folder).model
    assert adapters.load(model, tmp_path / "p").keys == PATHS
    model.eval()
    np.testing.assert_allclose(logits_of(model, TOKENS), oracle(folder, wanted), atol=1e-4)
    assert len(read_adapter(tmp_path / "p").left_out) == 2
    said = []
    warn_of_origin([tmp_path / "p"], str(folder), folder, None, said.append)
    assert "with 2 layers of vision or audio" in said[0]
    assert "left out" in said[0]


def test_an_adapter_of_a_tower_alone_and_two_layers_for_one_are_refused(folder, tmp_path):
    peft(tmp_path / "p", load_file(folder / "model.safetensors"))
    path = tmp_path / "p/adapter_model.safetensors"
    whole = load_file(path)
    save_file({k.replace("model.layers", "visual.layers"): v for k, v in whole.items()}, path)
    with pytest.raises(ModelError, match=r"layers of vision or audio alone \(visual\.layers\.1"):
        read_adapter(tmp_path / "p")
    save_file(whole, path)
    with_more(tmp_path / "p", "other.")
    with pytest.raises(ModelError, match=r"both mean model\.layers\.1\.self_attn\.q_proj"):
        adapters.load(load_model(folder).model, tmp_path / "p")


def test_a_pickled_peft_adapter_and_one_of_another_model_are_refused(folder, tmp_path):
    peft(tmp_path / "p", load_file(folder / "model.safetensors"))
    tensors = load_file(tmp_path / "p/adapter_model.safetensors")
    other = {k.replace("layers.3", "layers.9"): v for k, v in tensors.items()}
    save_file(other, tmp_path / "p/adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not have.*layers\.9\.mlp\.down_proj"):
        adapters.load(load_model(folder).model, tmp_path / "p")
    (tmp_path / "p/adapter_model.safetensors").rename(tmp_path / "p/adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, a pickle"):
        adapters.load(load_model(folder).model, tmp_path / "p")


def test_a_peft_adapters_scale_and_tensors_make_its_fingerprint(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    peft(tmp_path / "a", weights)
    peft(tmp_path / "b", weights, lora_dropout=0.1)
    peft(tmp_path / "c", weights, lora_alpha=13)
    a, b, c = (adapter_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def mlx_adapter(folder, target, kind="lora"):
    model = load_model(folder).model
    spec = adapters.AdapterSpec(kind, 3, 4, 2.5, 0.0, PATHS)
    adapters.attach(model, spec)
    adapters.update(model, {k: mx.array(v) for k, v in random_adapters(model).items()})
    target.mkdir()
    adapters.save(target / "adapters.safetensors", dict(adapters.parameters(model)))
    (target / "adapter_config.json").write_text(json.dumps(spec.as_config(str(folder))))
    model.eval()
    return logits_of(model, TOKENS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_exported_adapter_reads_back_as_the_same(folder, tmp_path, kind):
    want = mlx_adapter(folder, tmp_path / "ours", kind)
    assert adapters.export_peft(tmp_path / "ours", tmp_path / "peft", "owner/name") == 2
    model = load_model(folder).model
    adapters.load(model, tmp_path / "peft")
    model.eval()
    np.testing.assert_allclose(logits_of(model, TOKENS), want, atol=1e-5)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 10, kind == "dora")
    shapes = {k: v.shape for k, v in load_file(tmp_path / "peft/adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] == (4, 32)


def test_no_path_of_the_machine_stands_in_an_adapters_configuration(folder, tmp_path):
    mlx_adapter(folder, tmp_path / "ours")
    about = (tmp_path / "ours/adapter_config.json").read_text()
    assert str(folder.parent) not in about
    assert public_name("owner/name") == "owner/name"
    assert public_name(str(folder)) == folder.name


@pytest.mark.parametrize("keys", [True, False])
def test_an_adapter_of_an_older_mlx_lm_is_read(folder, tmp_path, keys):
    """lora_layers for num_layers; without keys the layers are those of the tensors."""
    want = mlx_adapter(folder, tmp_path / "old")
    path = tmp_path / "old/adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_layers"] = config.pop("num_layers")
    del config["fine_tune_type"]
    if not keys:
        del config["lora_parameters"]["keys"]
    path.write_text(json.dumps(config))
    model = load_model(folder).model
    adapters.load(model, tmp_path / "old")
    model.eval()
    np.testing.assert_allclose(logits_of(model, TOKENS), want, atol=1e-5)


def test_an_alpha_beside_a_scale_is_not_guessed_at(folder, tmp_path):
    mlx_adapter(folder, tmp_path / "old")
    path = tmp_path / "old/adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"]["alpha"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"alpha 16 beside scale 2\.5.*it is 10 or 2\.5"):
        read_adapter(tmp_path / "old")
    config["lora_parameters"]["alpha"] = 4  # = rank: both mean the same
    path.write_text(json.dumps(config))
    assert read_adapter(tmp_path / "old").scale == 2.5


def test_an_adapter_without_configuration_says_what_is_missing(tmp_path):
    np.savez(tmp_path / "adapters.npz", a=np.zeros(2))
    with pytest.raises(ModelError, match=r"adapters\.npz, as mlx-lm wrote it before 2024"):
        read_adapter(tmp_path)


def test_mlx_lm_itself_reads_what_is_made_of_a_peft_adapter(folder, tmp_path):
    """A run that starts from a PEFT adapter saves mlx-lm's form."""
    wanted = peft(tmp_path / "p", load_file(folder / "model.safetensors"), **FORMS["other ranks"])
    model = load_model(folder).model
    spec = adapters.load(model, tmp_path / "p")
    (tmp_path / "own").mkdir()
    adapters.save(tmp_path / "own/adapters.safetensors", dict(adapters.parameters(model)))
    (tmp_path / "own/adapter_config.json").write_text(json.dumps(spec.as_config("m")))
    theirs = utils.load(str(folder), adapter_path=str(tmp_path / "own"))[0]
    np.testing.assert_allclose(logits_of(theirs, TOKENS), oracle(folder, wanted), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": 0}, "lora_alpha of .* is 0"),
        ({"alpha_pattern": {"down_proj": 0}}, "lora_alpha of .*down_proj is 0"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern '\('.*Wanted what mlx-lm"),
    ],
)
def test_a_peft_configuration_that_gives_no_scale_is_named(folder, tmp_path, config, said):
    wanted = load_file(folder / "model.safetensors")
    if "alpha_pattern" in config:
        peft(tmp_path / "p", wanted)
        place = tmp_path / "p/adapter_config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | config))
    else:
        peft(tmp_path / "p", wanted, **config)
    with pytest.raises(ModelError, match=said):
        read_adapter(tmp_path / "p")


def test_pefts_oldest_configuration_is_its_own_in_the_fingerprint_too(folder, tmp_path):
    """It names no peft_type."""
    peft(tmp_path / "p", load_file(folder / "model.safetensors"))
    place = tmp_path / "p/adapter_config.json"
    config = json.loads(place.read_text())
    want = adapter_fingerprint(tmp_path / "p")
    place.write_text(json.dumps({k: v for k, v in config.items() if k != "peft_type"}))
    assert adapter_fingerprint(tmp_path / "p") == want


def test_an_export_of_tensors_that_are_no_pair_is_refused(folder, tmp_path):
    spec = adapters.AdapterSpec("lora", 1, 4, 1.0, 0.0, PATHS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(spec.as_config("m")))
    adapters.save(tmp_path / "a/adapters.safetensors", {f"{PATHS[0]}.lora_b": mx.zeros((4, 8))})
    with pytest.raises(ModelError, match="no form for an adapter of"):
        adapters.export_peft(tmp_path / "a", tmp_path / "out", "b")


def test_an_adapter_that_peft_made_gives_pefts_own_logits(folder):
    """fixtures/peft: by `scripts/checks/elsewhere.py --peft-fixture`, alpha 10 of rank 4."""
    place = Path(__file__).with_name("fixtures") / "peft"
    about = json.loads((place / "logits.json").read_text())
    model = load_model(folder).model
    base = logits_of(model, about["tokens"])[..., -1, :]
    spec = adapters.load(model, place)
    model.eval()
    assert (spec.rank, spec.scale) == (4, 2.5)
    got = logits_of(model, about["tokens"])[..., -1, :]
    np.testing.assert_allclose(got.squeeze(), about["logits"], atol=1e-4)
    assert np.abs(base - got).max() > 0.05
