"""What a command starts from: which model, adapter and SAE its reference is of."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from command_line import ROWS, lines  # noqa: E402
from evaluated import place  # noqa: E402, F401

from fpo_mlx.config import load_config  # noqa: E402
from fpo_mlx.errors import ConfigError, FpoError  # noqa: E402
from fpo_mlx.pipeline.job import open_job, open_saes  # noqa: E402
from fpo_mlx.pipeline.prepared import read_splits  # noqa: E402
from fpo_mlx.reference.weights import adapter_fingerprint  # noqa: E402


def test_a_reference_is_named_by_its_adapter_wherever_that_was_given(place, tmp_path):  # noqa: F811
    lines(tmp_path / "train.jsonl", *ROWS)
    words = {"model": str(place / "model"), "data": str(tmp_path), "objective": "dpo"}
    one, two = (str(place / name) for name in ("one", "two"))
    found = [
        open_job(load_config(words | more), say=lambda _: None, adapter=adapter).identity.adapter
        for more, adapter in (({}, None), ({}, one), ({"init_adapter": one}, None), ({}, two))
    ]
    assert found[0] == "none"
    assert found[1:] == [adapter_fingerprint(place / name) for name in ("one", "one", "two")]
    assert len(set(found)) == 3


def test_a_split_that_is_not_clear_is_refused_before_another_is_tokenized(
    place,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    for name in ("train", "valid", "validation"):
        lines(tmp_path / f"{name}.jsonl", *ROWS)
    words = {"model": str(place / "model"), "data": str(tmp_path), "objective": "dpo"}
    job = open_job(load_config(words), say=lambda _: None)
    assert len(read_splits(job.config, job.tokenizer, ("train",), print)["train"]) == len(ROWS)
    monkeypatch.setattr("fpo_mlx.pipeline.prepared.prepare", lambda *a, **k: pytest.fail("begun"))
    with pytest.raises(FpoError, match="valid and validation, each a name of the valid split"):
        read_splits(job.config, job.tokenizer, ("train", "valid"), print)


GEMMA = {  # heads x head size is less than the hidden size
    "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26,
    "num_attention_heads": 8, "head_dim": 256,
}  # fmt: skip
HELD = {"constraint": "activations"}


@pytest.mark.parametrize(
    ("site", "width"), [({}, 2304), ({"site": "mlp_out"}, 2304), ({"site": "attn_z"}, 2048)]
)
def test_activations_without_an_sae_are_as_wide_as_their_site(site, width):
    """Of attn_z it was the hidden size, and memory behind the rows was read."""
    (found,) = open_saes(load_config({**HELD, "layer": 25, **site}), GEMMA, say=lambda _: None)
    assert (found.n_features, found.d_in) == (width, width)
    assert str(found.site) == f"{site.get('site', 'resid_post')} of block 25"


@pytest.mark.parametrize(
    ("given", "about", "said"),
    [
        ({"layer": 26}, {}, "--layer 26: wanted 0 to 25"),
        ({"layer": -1}, {}, "--layer -1: wanted 0 to 25"),
        ({"layer": 3, "site": "mlp"}, {}, "--site mlp: wanted one of resid_pre, "),
        ({"layer": 3, "site": "attn_z"}, {"num_attention_heads": None}, "attn_z of block 3"),
        ({"layer": 3, "site": "attn_z"}, {"global_head_dim": 512}, r"attn_z .* \(2048 or 4096\)"),
    ],
)
def test_activations_of_a_place_that_the_model_lacks_are_refused(given, about, said):
    with pytest.raises(ConfigError, match=said):
        open_saes(load_config(HELD | given), GEMMA | about, say=lambda _: None)
