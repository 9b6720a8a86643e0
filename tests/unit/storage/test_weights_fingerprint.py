"""The fingerprint of weights: equal for equal numbers, whatever the files look like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fpo_mlx.errors import ModelError
from fpo_mlx.reference.weights import adapter_fingerprint, model_fingerprint

CONFIG = {"model_type": "llama", "rms_norm_eps": 1e-5, "quantization": {"bits": 4}}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"model.layers.{i}.w": rng.normal(size=(3, 4)).astype(np.float32) for i in range(4)}


def write_model(folder: Path, shards: list[dict], config: dict = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "mlx"})
        return folder
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors")
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", [tensors()])


def test_a_copy_another_split_and_another_name_have_the_same_fingerprint(model, tmp_path):
    want = model_fingerprint(model)
    assert len(want) == 64
    assert model_fingerprint(shutil.copytree(model, tmp_path / "copy")) == want
    items = list(tensors().items())
    split = write_model(tmp_path / "split", [dict(items[2:]), dict(items[:2])])
    assert model_fingerprint(split) == want


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "/home/me/llama"},
        {"transformers_version": "5.0"},
        {"torch_dtype": "bfloat16"},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": None},
        {"use_cache": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fields_that_no_logit_depends_on_do_not_count(model, tmp_path, change):
    other = write_model(tmp_path / "other", [tensors()], CONFIG | change)
    assert model_fingerprint(other) == model_fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_theta": 1e4},
        {"quantization": {"bits": 8}},
        {"tie_word_embeddings": True},
        {"final_logit_softcapping": 30.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fields_that_change_the_numbers_count(model, tmp_path, change):
    other = write_model(tmp_path / "other", [tensors()], CONFIG | change)
    assert model_fingerprint(other) != model_fingerprint(model)


def one_bit(t):
    t["model.layers.3.w"].view(np.uint8)[2, 3] ^= 1
    return t


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        lambda t: t | {"model.layers.0.w": t["model.layers.0.w"].reshape(4, 3)},
        lambda t: t | {"model.layers.0.w": t["model.layers.0.w"].view(np.int32)},
        lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()},
        lambda t: {k: v for k, v in t.items() if "3" not in k},
        lambda t: t | {"more": np.zeros(1, np.float32)},
    ],
    ids=["a bit", "a shape", "a dtype", "a name", "one less", "one more"],
)
def test_any_change_of_a_tensor_counts(model, tmp_path, change):
    other = write_model(tmp_path / "other", [change(tensors())])
    assert model_fingerprint(other) != model_fingerprint(model)


def test_an_adapter_or_a_second_form_beside_the_model_does_not_count(model):
    want = model_fingerprint(model)
    save_file(tensors(), model / "adapters.safetensors")
    save_file(tensors(), model / "consolidated.safetensors")
    assert model_fingerprint(model) == want


def test_a_tensor_longer_than_a_chunk_is_read_to_its_end(tmp_path, monkeypatch):
    from fpo_mlx.reference import weights

    model = write_model(tmp_path / "model", [tensors()])
    want = model_fingerprint(model)
    monkeypatch.setattr(weights, "CHUNK", 7)
    assert model_fingerprint(model) == want


def write_adapter(folder: Path, weights: dict, **config) -> Path:
    folder.mkdir()
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(weights, folder / "adapters.safetensors")
    return folder


def test_an_adapter_counts_by_tensors_kind_and_scale(tmp_path):
    base = adapter_fingerprint(write_adapter(tmp_path / "a", tensors()))
    same = write_adapter(tmp_path / "b", tensors(), model="/elsewhere", num_layers=16)
    assert adapter_fingerprint(same) == base
    scaled = write_adapter(tmp_path / "c", tensors(), lora_parameters={"rank": 4, "scale": 10.0})
    dora = write_adapter(tmp_path / "d", tensors(), fine_tune_type="dora")
    other = write_adapter(tmp_path / "e", one_bit(tensors()))
    found = {base, *(adapter_fingerprint(folder) for folder in (scaled, dora, other))}
    assert len(found) == 4
    assert adapter_fingerprint(None) == "none"


def test_what_cannot_be_read_is_refused_by_name(model, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere/config\.json cannot be read"):
        model_fingerprint(tmp_path / "nowhere")
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    for cut in (data[:5], data[:-1], data[:40], b""):
        weights.write_bytes(cut)
        with pytest.raises(ModelError, match=r"model\.safetensors is no whole safetensors file"):
            model_fingerprint(model)
    weights.unlink()
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        model_fingerprint(model)
    (model / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="wanted a JSON object"):
        model_fingerprint(model)
