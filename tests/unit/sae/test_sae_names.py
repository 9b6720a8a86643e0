"""Which names mean the same model: for the list of SAEs, its warnings and those of adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import random_sae

from fpo_mlx.pipeline.origins import _of_model
from fpo_mlx.records import Site
from fpo_mlx.sae import registry
from fpo_mlx.sae.check import check_fit
from fpo_mlx.storage.adapter_files import public_name
from fpo_mlx.storage.files import write_json
from fpo_mlx.storage.hub import unpinned

SAME = [
    ("google/gemma-2-2b", "google/gemma-2-2b@main"),
    ("google/gemma-2-2b", "google/gemma-2-2b@refs/pr/3"),
    ("google/gemma-2-2b", "/home/me@work/models/gemma-2-2b-4bit/"),
    ("gpt2-small", "openai-community/gpt2"),
    ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
    ("google/gemma-3-4b-it", "mlx-community/gemma-3-text-4b-it-4bit"),
    ("google/gemma-3-4b-pt", "mlx-community/gemma-3-4b-text-only-bf16"),
    ("meta-llama/Llama-3.1-8B", "mlx-community/Meta-Llama-3.1-8B-4bit-DWQ-2510"),
    ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-MLX-4bit"),
    ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B-unsloth-bnb-4bit"),
    ("Qwen/Qwen3-4B", "C:\\models\\Qwen3-4B-mxfp4"),
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-AWQ"),
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-FP8"),
    ("Qwen/Qwen3-4B", "models/Qwen3-4B-mixed_3_6"),
    ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8"),
    ("meta-llama/Llama-3.1-8B", "RedHatAI/Meta-Llama-3.1-8B-quantized.w4a16"),
    ("google/gemma-2-2b-it", "models/gemma-2-2b-it-int4"),
]
OTHER = [
    ("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-70m"),
    ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
    ("google/gemma-2-2b", "google/gemma-2-2b-it"),
    ("gpt2-small", "openai-community/gpt2-medium"),
    ("internlm/internlm2-7b", "internlm/internlm2-7b-reward"),
]


@pytest.mark.parametrize(
    ("own", "model", "same"), [(*p, True) for p in SAME] + [(*p, False) for p in OTHER]
)
def test_an_sae_and_an_adapter_know_their_model_however_it_is_spelled(tmp_path, own, model, same):
    sae = replace(random_sae(16), site=Site(0), model_name=own)
    warned = check_fit(sae, site=Site(0), hidden_size=16, n_layers=1, model_name=model)
    assert bool(warned) is not same
    write_json(tmp_path / "adapter_config.json", {"model": own})
    assert bool(_of_model(tmp_path, {}, model, lambda: "")) is not same


@pytest.mark.parametrize(
    ("model", "like"),
    [
        ("google/gemma-2-2b-it@main", "google/gemma-2-2b-it"),
        ("google/gemma-2-2b-it@refs/pr/3", "google/gemma-2-2b-it"),
        ("mlx-community/gemma-3-text-4b-it-4bit", "google/gemma-3-4b-it"),
        ("gpt2-small", "openai-community/gpt2"),
    ],
)
def test_the_table_knows_a_model_by_each_of_its_spellings(model, like):
    found = registry.fits(model)
    assert found == registry.fits(like)
    assert found
    assert [registry.trained_on(row, model) for row in found] == [
        registry.trained_on(row, like) for row in found
    ]


def test_a_model_of_other_training_data_or_of_another_version_is_listed_but_not_called_the_same():
    for model, other in (("EleutherAI/pythia-70m", "-deduped"), ("mistralai/Mistral-7B-v0.3", "")):
        rows = [r for r in registry.fits(model) if other in r.model]
        assert rows
        assert not any(registry.trained_on(row, model) for row in rows if row.model != model)


def test_what_is_passed_on_names_a_model_of_the_hub_without_its_revision():
    """PEFT, SAELens and the hub's cards look the name up, and none of them knows `@`."""
    assert public_name("owner/name@main") == public_name("owner/name@refs/pr/3") == "owner/name"
    assert unpinned("owner/name") == "owner/name"
    for path in ("/data/me@home/model", "./a/b@c", "~/b@c", "model@home"):
        assert unpinned(path) == path


def test_a_folder_with_an_at_sign_keeps_its_name(tmp_path: Path, monkeypatch):
    (tmp_path / "models/mine@home").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/mine@home") == "mine@home"
