"""An SAE that reads within a block: what lies behind it there is above it, as blocks above are."""

from __future__ import annotations

import json

import pytest
import tiny_models
from command_line import (  # noqa: F401
    BLOCK,
    ROWS,
    lines,
    own_cache_and_signals,
    random_sae,
    refused,
    train,
)

from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")
BEHIND = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LOOK = "adapters there can change the output where the constraint does not look"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("behind")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data" / "train.jsonl", *ROWS)
    return root


def keys_of(adapter) -> set[str]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return set(config["lora_parameters"]["keys"])


def path(name: str, block: int = BLOCK) -> str:
    return f"model.layers.{block}.{name}"


def test_what_lies_behind_the_sae_in_its_own_block_is_not_adapted(place, tmp_path):
    done = train(place, tmp_path / "a", "--site", "attn_z", "--val-batches", 0)
    assert done.exit_code == 0, done.stderr
    keys = keys_of(tmp_path / "a")
    assert {path("self_attn.q_proj"), path("self_attn.v_proj"), path("mlp.down_proj", 0)} <= keys
    assert not {path(name) for name in BEHIND} & keys
    said = (
        f"4 layers of block {BLOCK} lie behind the attn_z that the SAE reads, and get no adapters"
    )
    assert said in done.stderr
    assert LOOK not in done.stderr


def test_all_of_a_block_is_adapted_where_the_sae_reads_what_leaves_it(place, tmp_path):
    done = train(place, tmp_path / "a", "--val-batches", 0)
    assert done.exit_code == 0, done.stderr
    assert {path(name) for name in BEHIND} <= keys_of(tmp_path / "a")
    assert "lie behind" not in done.stderr


def test_adapters_behind_the_sae_that_are_asked_for_are_warned_of(place, tmp_path):
    words = ("--site", "attn_z", "--adapt-above-sae", "--val-batches", 0)
    done = train(place, tmp_path / "a", *words)
    assert done.exit_code == 0, done.stderr
    assert {path(name) for name in BEHIND} <= keys_of(tmp_path / "a")
    assert "of 28 adapted layers lie behind what the SAE reads" in done.stderr
    assert LOOK in done.stderr


def test_nothing_but_layers_behind_the_sae_is_refused(place, tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text("lora_parameters:\n  keys: [mlp.down_proj]\n")
    words = ("-c", settings, "--site", "attn_z", "--num-layers", 1)
    found = "no adapted layer lies at or before what the SAE reads"
    refused(train(place, tmp_path / "a", *words), 2, found, f"the attn_z of block {BLOCK}")
    done = train(place, tmp_path / "b", *words[:-1], 2, "--val-batches", 0)
    assert done.exit_code == 0, done.stderr
    assert keys_of(tmp_path / "b") == {path("mlp.down_proj", 0)}


def test_a_start_from_adapters_behind_the_sae_is_said(place, tmp_path):
    sft = tmp_path / "sft"
    assert train(place, sft, "--val-batches", 0).exit_code == 0
    words = ("--init-adapter", sft, "--site", "attn_z", "--val-batches", 0)
    done = train(place, tmp_path / "a", *words)
    assert done.exit_code == 0, done.stderr
    assert (
        f"{sft} adapts layers of block {BLOCK} behind the attn_z that the SAE reads" in done.stderr
    )
    assert LOOK in done.stderr
    again = train(place, tmp_path / "b", "--init-adapter", sft, "--val-batches", 0)
    assert LOOK not in again.stderr
