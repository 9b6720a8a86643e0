"""Tokenized pairs are kept by content: the same pairs without tokenizing, never another's."""

from __future__ import annotations

import json
import os

import pytest
from tiny_tokenizer import CHATML, build_tiny_tokenizer

import fpo_mlx.data.prepare as prepare_module
import fpo_mlx.data.tokenize as tokenize_module
import fpo_mlx.data.tokenizer as tokenizer_module
from fpo_mlx.data import Columns, token_store
from fpo_mlx.data.prepare import KEPT_FROM, prepare
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import DataError
from fpo_mlx.storage import locks

ROWS = [{"prompt": f"Q{n}", "chosen": "A" * (n % 40 + 2), "rejected": "B"} for n in range(700)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    return path


@pytest.fixture
def counted(monkeypatch):
    """How many rows were tokenized."""
    done = []
    plain = prepare_module.inspect

    def watched(*arguments):
        for item in plain(*arguments):
            done.append(item)
            yield item

    monkeypatch.setattr(prepare_module, "inspect", watched)
    return done


def plain(prepared):
    return [
        (p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist(), p.index, p.where)
        for p in prepared.pairs
    ]


def test_a_second_start_reads_the_same_pairs_and_tokenizes_none(tmp_path, data, tokenizer, counted):
    first = prepare(data, "train", tokenizer, store=tmp_path / "store")
    assert len(counted) == 701
    second = prepare(data, "train", tokenizer, store=tmp_path / "store")
    unkept = prepare(data, "train", tokenizer)
    assert len(counted) == 2 * 701
    assert plain(first) == plain(second) == plain(unkept)
    assert first.kinds == second.kinds == unkept.kinds
    assert first.topics == second.topics == unkept.topics
    assert {kind.first.kind: kind.count for kind in first.kinds} == {
        "duplicate": 1, "length bias": 1,
    }  # fmt: skip


def test_whatever_changes_the_tokens_or_their_names_is_tokenized_anew(
    tmp_path, data, tokenizer, counted
):
    store = tmp_path / "store"
    prepare(data, "train", tokenizer, store=store)
    other = build_tiny_tokenizer(tmp_path / "other", template="{# other #}" + CHATML)
    prepare(data, "train", load_tokenizer(other), store=store)
    prepare(data, "train", tokenizer, Columns(system="rules"), store=store)
    renamed = tmp_path / "pairs.jsonl"
    renamed.write_bytes(data.read_bytes())
    found = prepare(renamed, "train", tokenizer, store=store)
    assert found.pairs[3].where == "pairs.jsonl:4"
    data.write_text(data.read_text().replace("Q5", "Q7"))
    prepare(data, "train", tokenizer, store=store)
    assert len(counted) == 5 * 701
    assert len([path for path in store.iterdir() if path.is_dir()]) == 5


@pytest.mark.parametrize("name", [token_store.TOKENS, token_store.ROWS, token_store.ABOUT])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_damaged_files_are_made_again(tmp_path, data, tokenizer, counted, name, how):
    store = tmp_path / "store"
    first = plain(prepare(data, "train", tokenizer, store=store))
    (folder,) = (path for path in store.iterdir() if path.is_dir())
    content = (folder / name).read_bytes()
    if how == "gone":
        (folder / name).unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (folder / name).write_bytes(content[:middle] if how == "cut" else flipped)
    again = plain(prepare(data, "train", tokenizer, store=store))
    assert again == first
    assert len(counted) in (701, 2 * 701)  # a flipped bit of a finding's words harms no pair


def test_a_store_that_cannot_be_written_stops_nothing(tmp_path, data, tokenizer):
    (tmp_path / "store").write_text("a file is in the way")
    found = prepare(data, "train", tokenizer, store=tmp_path / "store" / "tokens")
    assert len(found.pairs) == 701


def test_a_small_split_leaves_nothing_behind(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[: KEPT_FROM - 1]))
    assert len(prepare(path, "train", tokenizer, store=tmp_path / "store").pairs) == KEPT_FROM - 1
    assert not (tmp_path / "store").exists()


def test_rows_that_cannot_be_used_are_all_named_and_nothing_is_kept(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{}\n" + json.dumps({**ROWS[1], "chosen": "B"}) + "\n")
    with pytest.raises(DataError, match="2 of 3 rows cannot be used.*--fix") as caught:
        prepare(path, "train", tokenizer, store=tmp_path / "store")
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        "train.jsonl:2", "train.jsonl:3",
    ]  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_tokens_kept_before_a_rows_own_variables_were_heeded_are_not_taken(
    tmp_path, data, monkeypatch
):
    """A run took them, and never said that the column asks for another text."""
    asking = [{**row, "chat_template_kwargs": {"mood": "glad"}} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in asking))
    moody = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=CHATML + "{{ mood }}"))
    with monkeypatch.context() as before:
        before.setattr(token_store, "FORMAT", 2)
        before.setattr(tokenize_module, "other_text", lambda *_: None)
        assert len(prepare(data, "train", moody, store=tmp_path / "store").pairs) == len(ROWS)
    with pytest.raises(DataError, match="700 of 700 rows cannot be used"):
        prepare(data, "train", moody, store=tmp_path / "store")


def test_the_longest_unused_go_first_and_the_newest_stays(tmp_path):
    for name in ("old", "older", "new"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / token_store.ABOUT).write_bytes(b"x" * 100)
        age = {"new": 30, "old": 20, "older": 10}[name]
        os.utime(folder, (age, age))
    token_store.prune(tmp_path, keep=tmp_path / "new", most=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    token_store.prune(tmp_path, keep=tmp_path / "new", most=50)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "jinja2"])
def test_another_version_of_who_renders_does_not_take_what_the_old_one_kept(
    tokenizer, monkeypatch, library
):
    before = tokenizer.encoding_key()
    real = tokenizer_module.version
    monkeypatch.setattr(
        tokenizer_module, "version", lambda name: "0" if name == library else real(name)
    )
    assert tokenizer.encoding_key() != before


def test_what_killed_runs_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    (tmp_path / "new").mkdir()
    for name in (".tmp-999999-dead", ".tmp-999998-alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.i32").write_bytes(bytes(8))
    with locks.held(tmp_path / ".alive.lock", tmp_path):
        token_store.prune(tmp_path, keep=tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-999998-alive", "new"]


def test_rows_that_a_check_reads_are_kept_as_prepare_keeps_them(tmp_path, tokenizer, counted):
    from fpo_mlx.config import load_config
    from fpo_mlx.pipeline.check import check
    from fpo_mlx.pipeline.prepared import token_folder

    folder = build_tiny_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(path.read_text() + '{"prompt": "Q"}\n')
    for source in (path, bad):
        check(load_config({"model": str(folder), "data": str(source)}), fix=None, say=str)
    kept = prepare(path, "train", load_tokenizer(folder), store=token_folder())
    assert not counted
    want = prepare(path, "train", load_tokenizer(folder))
    assert plain(kept) == plain(want)
    assert (kept.kinds, kept.topics) == (want.kinds, want.topics)
    assert len(list(token_folder().iterdir())) == 1  # nothing of a set with a row of no use


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
