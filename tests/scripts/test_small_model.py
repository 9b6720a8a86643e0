"""scripts/studies/small_model.py: what it trains learns its chats and loads as any model does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import small_model as study  # noqa: E402

from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402

WORDS = ("red", "green", "blue", "one", "two", "three")
CHATS = [
    [{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{b} {a}."}]
    for a in WORDS
    for b in WORDS
]


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 280}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    monkeypatch.setattr(study, "CONFIG", {**study.CONFIG, **size})
    monkeypatch.setattr(study, "WINDOW", 24)


def test_it_learns_its_chats_and_its_folder_loads(tmp_path):
    values = []
    for updates in (1, 60):
        folder = tmp_path / str(updates)
        study.train(CHATS, folder, updates)
        model = load_model(folder).model
        rows = itertools.islice(study.batches(CHATS, folder), 4)
        values.append(np.mean([study.loss(model, row).item() for row in rows]))
    assert values[0] > np.log(280), "one update knows no more than chance"
    assert values[1] < 1.0


def test_rows_are_the_rendered_chats_in_a_row_and_no_row_comes_twice_in_a_pass(tmp_path):
    study.build_tiny_tokenizer(tmp_path, vocabulary=280)
    tokenizer = load_tokenizer(tmp_path)
    whole = [tokenizer.encode([tokenizer.render(c, None, prompt=False)])[0] for c in CHATS]
    stream = np.concatenate(whole)
    size = study.WINDOW + 1
    one_pass = len(stream) // size // study.BATCH
    rows = [np.array(b) for b in itertools.islice(study.batches(CHATS, tmp_path), one_pass)]
    seen = {row.tobytes() for batch in rows for row in batch.astype(np.int64)}
    packed = stream[: len(stream) // size * size].reshape(-1, size).astype(np.int64)
    assert seen <= {row.tobytes() for row in packed}
    assert sum(map(len, rows)) == one_pass * study.BATCH
