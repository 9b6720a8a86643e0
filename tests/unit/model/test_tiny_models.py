"""transformers and mlx-lm give the same logits for every tiny architecture."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from tiny_make import for_transformers
from tiny_models import MAKERS, tiny_gemma2, tiny_gemma3_text, tiny_llama, tiny_qwen3_next
from transformers import AutoModelForCausalLM

TOKENS = np.random.default_rng(7).integers(0, 300, (1, 17))  # longer than every window of 6


def torch_logits(folder: Path, **settings: object) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        for_transformers(folder), attn_implementation="eager", local_files_only=True, **settings
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("architecture", MAKERS)
def test_transformers_and_mlx_lm_give_the_same_logits(architecture: str, tmp_path: Path):
    folder = MAKERS[architecture](tmp_path / architecture)
    model, _ = load_model(folder)
    wanted = torch_logits(folder)
    got = np.array(model(mx.array(TOKENS)))[0]
    assert wanted.std() > 0.5, "logits this flat would hide an error"
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_the_soft_caps_of_tiny_gemma2_are_in_effect(cap: str, tmp_path: Path):
    folder = tiny_gemma2(tmp_path)
    capped, uncapped = torch_logits(folder), torch_logits(folder, **{cap: 1e6})
    assert np.abs(capped - uncapped).max() > 0.5


def test_the_window_of_tiny_gemma3_is_in_effect(tmp_path: Path):
    folder = tiny_gemma3_text(tmp_path)
    change = np.abs(torch_logits(folder) - torch_logits(folder, sliding_window=4096)).max(axis=-1)
    np.testing.assert_allclose(change[:6], 0, atol=1e-4)
    assert change[6:].max() > 0.5


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3_next])
def test_a_seed_names_its_weights(make, tmp_path: Path):
    files = [
        (make(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_tokenizer_comes_along_when_asked_for(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path, tokenizer=True))
    assert max(tokenizer("Any text, éven this.").input_ids) < 300
