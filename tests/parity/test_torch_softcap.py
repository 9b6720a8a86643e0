"""Gemma 2 caps what its attention computes, and only one kind of attention has that cap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

import oracle
import tiny_models
from test_torch_backend import assert_scores_are_the_oracle_s, make_pairs, save_with_mlx
from tiny_make import for_transformers

from fpo_mlx.reference.torch_backend import TorchBackend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def other_default(monkeypatch):
    """As a version of transformers that takes PyTorch's fused attention, which has no cap."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)


@pytest.mark.usefixtures("other_default")
@pytest.mark.parametrize("kind", ["hugging face", "mlx"])
def test_attention_keeps_its_cap_whatever_transformers_takes_by_itself(kind, tmp_path):
    source = tiny_models.MAKERS["gemma2"](tmp_path / "model")
    folder = for_transformers(source)
    if kind == "mlx":
        folder = save_with_mlx(source, tmp_path / "mlx")
    model, pairs = oracle.load_oracle(source), make_pairs(3)
    backend = TorchBackend(folder, device="cpu")
    assert_scores_are_the_oracle_s(model, [], pairs, backend.score(pairs))


@pytest.mark.usefixtures("other_default")
def test_attention_without_a_cap_is_left_to_transformers(tmp_path):
    folder = for_transformers(tiny_models.MAKERS["gemma2"](tmp_path / "model"))
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
    found = [TorchBackend(f, device="cpu")._model.config for f in (folder, plain)]
    assert [config._attn_implementation for config in found] == ["eager", "sdpa"]
