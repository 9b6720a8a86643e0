"""Documents for an SAE: what a row is, which positions count, and which are held out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_tokenizer import build_tiny_tokenizer

from fpo_mlx.data import Columns, documents
from fpo_mlx.data import read as data_read
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.saetrain import texts

TEXTS = [
    f"{'abcdefghijklmnopqrstuvwxyz'[i % 26]} poem {i * i} of the sea, the rain and star {i % 7}."
    for i in range(20)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"{t}?"}, {"role": "assistant", "content": t}]}
    for t in TEXTS
]
PAIRS = [{"prompt": f"{t}?", "chosen": f"Yes, {t}", "rejected": "No."} for t in TEXTS]
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
NO_PAIR = {"prompt": "q", "chosen": None, "rejected": None}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("model")))


def documents_of(tmp_path, tokenizer, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts.read_documents(str(path), tokenizer, max_length=200, **options)


def test_response_positions_are_those_that_predict_the_answer(tmp_path, tokenizer):
    for kind, rows in (("chat", CHATS), ("pairs", PAIRS)):
        found = documents_of(tmp_path, tokenizer, rows, tokens="response")
        assert found.kind == kind
        item = found.items[0]
        predicted = tokenizer.decode(item.tokens[np.flatnonzero(item.keep) + 1])
        answer = TEXTS[0] if kind == "chat" else f"Yes, {TEXTS[0]}"
        assert predicted.startswith(answer)
        assert not item.keep[0]


def test_first_positions_and_repeated_beginnings_are_left_out(tmp_path, tokenizer):
    found = documents_of(tmp_path, tokenizer, CHATS)
    head = len(tokenizer.text_tokens("<|im_start|>user\n"))
    assert not any(item.keep[0] for item in found.items)
    kept = [item.keep[1:head].all() for item in found.items]
    assert kept == [at % 10 == 0 for at in range(20)]
    assert all(item.keep[head + 1 :].all() for item in found.items)
    assert f"same {head} tokens" in found.notes[0]


@pytest.mark.parametrize(("name", "kind"), [("text", "text"), ("messages", "chat")])
def test_columns_that_make_no_pair_beside_a_text_or_a_chat_do_no_harm(
    tmp_path, tokenizer, name, kind
):
    source = {"text": TEXTS, "messages": [row["messages"] for row in CHATS]}[name]
    rows = [{name: one, "answer": "yes", "score": 3} for one in source]
    assert documents_of(tmp_path, tokenizer, rows).kind == kind


def test_a_first_row_that_is_nothing_names_the_file_and_why_it_is_no_pair(tmp_path, tokenizer):
    tie = {"prompt": "Q", "response_a": "A", "response_b": "B", "winner": "tie"}
    with pytest.raises(DataError, match="the row has the columns prompt, ") as caught:
        documents_of(tmp_path, tokenizer, [tie])
    assert f"{tmp_path / 'rows.jsonl'}: " in str(caught.value)
    assert "As a pair it is refused: winner prefers neither answer. " in str(caught.value)


def test_lines_that_break_before_the_first_row_are_told_for_what_they_are(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": \n{"text": "a"}\n3\n')
    with pytest.raises(DataError, match="2 of 3 rows cannot be used as text") as caught:
        texts.read_documents(str(path), tokenizer, max_length=50)
    assert "rows.jsonl:1: not JSON" in str(caught.value)
    assert "rows.jsonl:3: a row is an object with named columns, not a number" in str(caught.value)
    for content in ('{"text": \n', '{"text": \n3\n'):
        path.write_text(content)
        with pytest.raises(DataError, match="no telling whether") as caught:
            texts.read_documents(str(path), tokenizer, max_length=50)
        assert "rows.jsonl:1: not JSON" in str(caught.value)
    assert "rows.jsonl:2: a row is an object with named columns, not a number" in str(caught.value)


def test_a_pair_whose_prompt_fills_the_limit_is_left_out_and_counted(tmp_path, tokenizer):
    long = {**PAIRS[0], "prompt": "A long one. " * 60}
    alone = documents_of(tmp_path, tokenizer, PAIRS)
    found = documents_of(tmp_path, tokenizer, [PAIRS[0], long, *PAIRS[1:], long])
    assert found.fingerprint() == alone.fingerprint()
    (said,) = set(found.notes) - set(alone.notes)
    assert "2 of 22 pairs are dropped" in said
    assert "rows.jsonl:2" in said
    with pytest.raises(DataError, match=r"wanted a larger --max-seq-length.*\n  1 of 1 pairs"):
        documents_of(tmp_path, tokenizer, [long])


def test_chats_whose_first_answer_is_behind_the_limit_are_left_out_and_counted(tmp_path, tokenizer):
    """Forty of them first, which the norm limit is measured on, ended in a traceback."""
    late = {"messages": [{"role": "user", "content": "A long one. " * 60}, CHAT[1]]}
    alone = documents_of(tmp_path, tokenizer, CHATS, tokens="response")
    found = documents_of(tmp_path, tokenizer, [late] * 40 + CHATS, tokens="response")
    assert found.fingerprint() == alone.fingerprint()
    assert all(item.keep.any() for item in found.items)
    (said,) = set(found.notes) - set(alone.notes)
    assert said.startswith("40 of 60 chats are left out: no answer begins within 200 tokens")
    with pytest.raises(DataError, match=r"wanted a larger --max-seq-length.*\n  1 of 1 chats"):
        documents_of(tmp_path, tokenizer, [late], tokens="response")


def test_texts_of_one_token_are_no_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "bos", [])
    short = [{"text": "a"}] * 40
    found = documents_of(tmp_path, tokenizer, short + [{"text": t} for t in TEXTS])
    assert len(found.items) == len(TEXTS)
    with pytest.raises(DataError, match="wanted longer texts"):
        documents_of(tmp_path, tokenizer, short)


def test_pairs_whose_prompt_the_template_rewrites_are_shown_as_training_shows_them(
    tmp_path, tokenizer
):
    later = "{% for m in messages %}{% if loop.last and m.role == 'user' %}? {% endif %}"
    other = replace(tokenizer, templates={"default": later + "{{ m.content }}{% endfor %}"})
    with pytest.raises(DataError, match=r"At rows\.jsonl:1 it is not:\n  prompt: '\? "):
        documents_of(tmp_path, other, PAIRS)


@pytest.mark.parametrize("kind", ["auto", "chat"])
def test_no_row_is_read_that_the_limit_does_not_take(tmp_path, tokenizer, monkeypatch, kind):
    seen, plain = [], data_read.file_rows
    monkeypatch.setattr(
        data_read, "file_rows", lambda path: (seen.append(row) or row for row in plain(path))
    )
    found = documents_of(tmp_path, tokenizer, CHATS, limit=1, kind=kind)
    assert len(found.items) == len(seen) == 1


def test_long_texts_become_windows_behind_a_bos(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("one long line of text " * 40 + "\n\n" + "a second document")
    found = texts.read_documents(str(path), tokenizer, max_length=50)
    joined = [token for item in found.items for token in item.tokens[1:]]
    assert {int(item.tokens[0]) for item in found.items} == {tokenizer.raw.bos_token_id}
    assert max(len(item.tokens) for item in found.items) == 50
    text = ("one long line of text " * 40).strip()
    assert tokenizer.decode(joined) == text + "a second document"


def test_pairs_of_one_prompt_are_held_out_together(tmp_path, tokenizer):
    """The prompt's activations are the same in all of them: the figures were of rows trained on."""
    rows = [
        {"prompt": f"What is {i // 2}?", "chosen": f"It is {i}.", "rejected": f"Not {i}, surely."}
        for i in range(40)
    ]
    items = documents_of(tmp_path, tokenizer, rows).items
    train, held = texts.split_held_out(items, 0.2, seed=0, most=10**9)
    begun = [{tuple(item.tokens[:20]) for item in part} for part in (train, held)]
    assert len(begun[0] | begun[1]) == 20
    assert begun[1]
    assert not begun[0] & begun[1]
    assert len(held) == 4 * len(begun[1])


def test_chats_that_begin_with_one_question_are_held_out_together(tmp_path, tokenizer):
    """As pairs are: other models' answers to it have the same beginning, and its activations."""

    def chat(number, answer):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": number}]
        return {"messages": [*turns, {"role": "assistant", "content": answer}]}

    rows = [chat(f"What is {i // 3}?", f"Answer {i}.") for i in range(60)]
    items = documents_of(tmp_path, tokenizer, rows).items
    train, held = texts.split_held_out(items, 0.2, seed=0, most=10**9)
    assert held
    assert len(held) % 3 == 0
    assert not {item.prompt for item in train} & {item.prompt for item in held}
    assert len({item.prompt for item in items}) == 20


def test_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
    items = documents_of(tmp_path, tokenizer, CHATS).items
    train, held = texts.split_held_out(items, 0.2, seed=0, most=10**9)
    assert {id(item) for item in (*train, *held)} == {id(item) for item in items}
    assert len(train) + len(held) == len(items)
    assert 1 <= len(held) <= 6
    assert texts.split_held_out(items, 0.0, seed=0, most=10**9)[1] == []


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
        _, held = texts.split_held_out(items[:20], 0.1, seed=seed, most=10**9)
        assert len(held) == 2, "of two prompts the small one is held out, whichever is drawn first"


def test_the_name_of_a_split_is_refused_for_a_plain_text_as_for_any_one_file(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("A text.")
    hub = texts.data.HubSplits(train="prefs")
    with pytest.raises(ConfigError, match="--train-split prefs: .* is one split by itself"):
        texts.read_documents(str(path), tokenizer, max_length=50, hub=hub)
