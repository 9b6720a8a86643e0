"""Documents for an SAE: what a row is, and which are held out."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import build_tiny_tokenizer

from fpo_mlx.data import Columns, documents
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import ConfigError
from fpo_mlx.saetrain import texts

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
NO_PAIR = {"prompt": "q", "chosen": None, "rejected": None}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**NO_PAIR, "messages": CHAT}, "chat"),
        ({**NO_PAIR, "text": "a text of its own"}, "text"),
        ({**PAIR, "messages": CHAT}, "pairs"),
        (NO_PAIR, "pairs"),  # and refused as one
    ],
)
def test_what_a_row_of_several_kinds_is_says_the_column_that_is_filled(row, kind):
    assert documents.kind_of(row, Columns()) == kind


def test_a_pair_with_an_image_does_not_become_a_chat():
    with pytest.raises(RowFault, match="the row has image"):
        documents.kind_of({**PAIR, "image": "a.png", "messages": CHAT}, Columns())


def test_a_prompt_of_most_rows_is_trained_on(tmp_path, tokenizer):
    prompts = ["The one"] * 9 + [f"Another {i}" for i in range(5)]
    rows = [
        {"prompt": p, "chosen": f"Yes {i}.", "rejected": f"{i}?"} for i, p in enumerate(prompts)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = texts.read_documents(str(path), tokenizer, max_length=200).items
    for seed in range(4):
        _, held = texts.split_held_out(items, 0.1, seed=seed, most=10**9)
        assert 2 <= len(held) <= 4


def test_the_name_of_a_split_is_refused_for_a_plain_text_as_for_any_one_file(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("A text.")
    hub = texts.data.HubSplits(train="prefs")
    with pytest.raises(ConfigError, match="--train-split prefs: .* is one split by itself"):
        texts.read_documents(str(path), tokenizer, max_length=50, hub=hub)
