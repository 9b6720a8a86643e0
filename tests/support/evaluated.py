"""A tiny model with an SAE, held-out pairs and two random adapters: something to evaluate."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
import tiny_models
from command_line import ROWS, lines, random_sae
from helpers import random_adapters

from fpo_mlx.model import adapters
from fpo_mlx.model.load import load_model
from fpo_mlx.sae.convert import write_saelens

KEYS, K = ("self_attn.q_proj", "mlp.down_proj"), 5


def adapter(folder, model, seed, size=0.15):
    """A random adapter, in the files that mlx-lm reads."""
    loaded = load_model(model)
    n, paths = adapters.adapted_paths(loaded.model, 2, 1, KEYS)
    spec = adapters.AdapterSpec("lora", n, 3, 2.0, 0.0, paths)
    adapters.attach(loaded.model, spec)
    values = random_adapters(loaded.model, size, seed)
    adapters.save(folder / adapters.WEIGHTS, {k: mx.array(v) for k, v in values.items()})
    (folder / adapters.CONFIG).write_text(json.dumps(spec.as_config(str(model))))
    return values


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data" / "valid.jsonl", *ROWS)
    for i, name in enumerate(("one", "two")):
        (root / name).mkdir()
        adapter(root / name, root / "model", i, 0.15 * (1 + i))
    return root


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(place / "user-cache"))
