"""Sources of pairs: files, folders, the hub; and what is said when there is nothing to read."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fpo_mlx.data import HubSplits, content_key, find_splits, iterate_raw, read_split
from fpo_mlx.errors import DataError, FpoError

PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_folder_is_read_split_by_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(PAIR, {**PAIR, "prompt": "R"}))
    (tmp_path / "valid.jsonl").write_text(lines({**PAIR, "prompt": "V"}))
    train, valid = (read_split(str(tmp_path), split) for split in ("train", "valid"))
    assert [row.prompt[0]["content"] for row in train] == ["Q", "R"]
    assert [(row.where, row.index) for row in train] == [("train.jsonl:1", 0), ("train.jsonl:2", 1)]
    assert [row.prompt[0]["content"] for row in valid] == ["V"]
    assert set(find_splits(tmp_path)) == {"train", "valid"}


def test_a_file_is_the_one_split_that_is_asked_for(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(lines(PAIR))
    assert find_splits(file) == {"train": file}
    assert find_splits(file, want="test") == {"test": file}
    assert read_split(file, "test")[0].where == "pairs.jsonl:1"


@pytest.mark.parametrize(
    ("split", "one", "other"),
    [("valid", "valid", "validation"), ("train", "train", "train_prefs"), ("test", "test_prefs",
     "test")],
)  # fmt: skip
def test_two_names_of_one_split_are_refused_unless_one_is_asked_for(tmp_path, split, one, other):
    for name in {"train", "valid", "test", one, other}:
        (tmp_path / f"{name}.jsonl").write_text(lines(PAIR))
    with pytest.raises(FpoError, match=f"each a name of the {split} split") as caught:
        read_split(tmp_path, split)
    for unlike in {"train", "valid", "test"} - {split}:
        assert len(read_split(tmp_path, unlike)) == 1  # for which it does not matter
    assert all(part in str(caught.value) for part in (one, other, f"--{split}-split"))
    asked = HubSplits(**{split: other})
    assert find_splits(tmp_path, asked)[split] == tmp_path / f"{other}.jsonl"


def test_test_prefs_is_the_test_beside_a_split_called_valid(tmp_path):
    for name in ("train", "valid", "test_prefs"):
        (tmp_path / f"{name}.jsonl").write_text(lines(PAIR))
    found = find_splits(tmp_path)
    assert found["valid"] == tmp_path / "valid.jsonl"
    assert found["test"] == tmp_path / "test_prefs.jsonl"


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    file = tmp_path / "pairs.jsonl"
    row = json.dumps(PAIR).encode()
    file.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row)
    assert [(row.where, row.index) for row in read_split(file)] == [
        ("pairs.jsonl:1", 0),
        ("pairs.jsonl:4", 1),
    ]


def test_rows_of_another_kind_are_told_the_ways_to_pairs(tmp_path):
    """To "mend" a KTO set, or write it without its bad rows, leaves nothing."""
    file = tmp_path / "train.jsonl"
    file.write_text(lines({"prompt": "Q", "completion": "A", "label": True}))
    with pytest.raises(DataError) as caught:
        read_split(file)
    said = str(caught.value)
    for part in ("1 of 1 rows", "`fpo-mlx pairs generate --prompts FILE`", "`fpo-mlx pairs build`",
                 "train.jsonl:1: one answer (completion) and its label: no pair"):  # fmt: skip
        assert part in said
    for part in ("--fix", "Mend them", "Choose two"):  # of one answer
        assert part not in said


SINGLE = {"prompt": "Q", "completion": "A", "label": True}
SEVERAL = {"prompt": "Q", "responses": ["A", "B", "C"], "scores": [1, 2, 3]}
TIE = {**PAIR, "rejected": PAIR["chosen"]}


@pytest.mark.parametrize(
    ("rows", "ways"),
    [
        ((SINGLE, SINGLE), "cannot be used. Have the prompts answered anew"),
        ((SINGLE, SEVERAL), "cannot be used. Choose two of a row's answers"),
        ((SINGLE, TIE), "(`fpo-mlx pairs build`). Mend the others:"),
        ((SEVERAL, TIE, PAIR), "(`fpo-mlx pairs build`). Mend the others, or let"),
        ((SINGLE, PAIR), "(`fpo-mlx pairs build`), or let `fpo-mlx check --data"),
    ],
)
def test_each_way_is_named_only_where_some_row_can_take_it(tmp_path, rows, ways):
    (tmp_path / "train.jsonl").write_text(lines(*rows))
    with pytest.raises(DataError) as caught:
        read_split(tmp_path)
    said = str(caught.value)
    assert ways in said
    assert ("Choose" in said) is (SEVERAL in rows)
    assert ("Mend" in said) is (TIE in rows)


def test_where_every_row_is_bad_no_data_without_them_is_offered(tmp_path):
    tie = {**PAIR, "rejected": PAIR["chosen"]}
    for rows, offered in (((tie, tie), False), ((PAIR, tie), True)):
        (tmp_path / "train.jsonl").write_text(lines(*rows))
        with pytest.raises(DataError, match="rows cannot be used. Mend them") as caught:
            read_split(tmp_path)
        way = "`fpo-mlx check --data DATA --model MODEL --fix OUT`"  # without a model no template
        assert (way in str(caught.value)) == offered


def test_all_bad_rows_are_named_at_once(tmp_path):
    file = tmp_path / "train.jsonl"
    bad = [b'{"prompt": "Q",', b"\xff\xfe", b"[1]", b'{"prompt": "Q", "rejected": "B"}']
    deep, big = b"[" * 100_000, b"1" * 5_000
    rows = [json.dumps(PAIR).encode(), *bad, deep, big]
    file.write_bytes(b"\n".join(rows))
    with pytest.raises(DataError) as caught:
        read_split(tmp_path)
    assert caught.value.exit_code == 3
    assert "6 of 7 rows cannot be used" in str(caught.value)
    wheres = [fault.split(": ")[0] for fault in caught.value.faults]
    assert wheres == [f"train.jsonl:{number}" for number in range(2, 8)]
    said = [fault.split(": ", 1)[1] for fault in caught.value.faults]
    assert said[0].startswith("not JSON: Expecting property name")
    assert said[1] == "not UTF-8 (byte 1 of the line)"
    assert said[2] == "a row is an object with named columns, not a list"
    assert said[3].startswith("no 'chosen'")
    assert said[4] == "not JSON: nested too deeply"
    assert said[5] == "not JSON: a number with too many digits"


def test_a_long_list_of_faults_is_cut_in_the_message_only(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(*[{}] * 50))
    with pytest.raises(DataError) as caught:
        read_split(tmp_path)
    assert len(caught.value.faults) == 50
    assert "… and 30 more" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused_as_data(tmp_path, content):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"train\.jsonl holds no rows") as caught:
        read_split(tmp_path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("source", ["absent.jsonl", "no/such/folder", "./absent", "folder"])
def test_a_missing_file_is_a_plain_error_and_never_asks_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fpo_mlx.data.read._hub_splits", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(FpoError, match="no such file or folder") as caught:
        read_split(source)
    assert caught.value.exit_code == 1


def test_a_missing_split_names_the_file_and_those_that_exist(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(PAIR))
    with pytest.raises(FpoError, match=r"test\.jsonl: no such file.*found in .*: train") as caught:
        read_split(tmp_path, "test")
    assert caught.value.exit_code == 1
    with pytest.raises(FpoError, match="'dev' is no split"):
        read_split(tmp_path, "dev")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: owner/name -> split -> rows, through real `datasets` tables."""
    import datasets

    def install(splits):
        tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        asked = []

        def names(source, subset=None):
            asked.append((source, subset))
            return list(tables)

        monkeypatch.setattr(datasets, "get_dataset_split_names", names)
        monkeypatch.setattr(datasets, "load_dataset", lambda source, subset, split: tables[split])
        return asked

    return install


FEEDBACK = {
    "prompt": "Q",
    "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
}


def test_the_splits_of_ultrafeedback_are_found(hub):
    asked = hub({"train_sft": [{"x": 1}], "train_prefs": [FEEDBACK] * 3, "test_prefs": [FEEDBACK]})
    found = find_splits("owner/feedback")
    # what was looked at in training is no test by itself, but may be called one
    assert found == {"train": "train_prefs", "valid": "test_prefs"}
    assert find_splits("owner/feedback", HubSplits(test="test_prefs"))["test"] == "test_prefs"
    with pytest.raises(FpoError, match=r"no test split; .*--test-split NAME"):
        read_split("owner/feedback", "test")
    rows = read_split("owner/feedback", "train")
    assert [row.where for row in rows] == [f"owner/feedback[train_prefs]:{n}" for n in (1, 2, 3)]
    assert rows[0].chosen == ({"role": "assistant", "content": "A"},)
    assert asked[0] == ("owner/feedback", None)


def test_named_splits_and_a_subset_are_used(hub):
    asked = hub({"train": [PAIR], "held_out": [PAIR] * 2, "test": [PAIR]})
    assert set(find_splits("owner/name")) == {"train", "test"}  # test is not taken for valid
    names = HubSplits(valid="held_out", subset="english")
    assert len(read_split("owner/name", "valid", hub=names)) == 2
    assert asked[-1] == ("owner/name", "english")
    with pytest.raises(FpoError, match=r"no split 'prefs' \(--train-split\); it has train, held"):
        read_split("owner/name", "train", hub=HubSplits(train="prefs"))
    with pytest.raises(FpoError, match="no valid split; found: train .* --valid-split NAME"):
        read_split("owner/name", "valid")


def test_a_slice_of_a_split_is_read_as_datasets_reads_it(hub, monkeypatch, tmp_path):
    import datasets

    rows = [{**PAIR, "prompt": f"Q{n}"} for n in range(10)]
    load, files = datasets.load_dataset, {"train": str(tmp_path / "train.jsonl")}
    hub({"train": rows, "test": [PAIR]})
    (tmp_path / "train.jsonl").write_text(lines(*rows))
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda source, subset, split: load(
            "json", data_files=files, split=split, cache_dir=str(tmp_path / "cache")
        ),
    )  # fmt: skip
    for asked, wanted in (("train[:3]", [0, 1, 2]), ("train[-20%:]", [8, 9]), ("train[4:5]", [4])):
        names = HubSplits(train=asked)
        read = read_split("owner/name", "train", hub=names)
        assert [row.prompt[0]["content"] for row in read] == [f"Q{n}" for n in wanted]
        assert read[0].where == f"owner/name[{asked}]:1"
    keys = {content_key("owner/name", "train", HubSplits(train=f"train[:{n}]")) for n in (2, 3)}
    assert len(keys) == 2
    with pytest.raises(FpoError, match="corresponds to no data"):
        read_split("owner/name", "train", hub=HubSplits(train="train[20:]"))


def test_rows_of_a_slice_are_in_no_other_split_that_nobody_named(hub):
    hub({"train": [PAIR] * 9, "test": [PAIR] * 9})
    assert find_splits("owner/name", HubSplits(valid="test[:5]")) == {
        "train": "train", "valid": "test[:5]",
    }  # fmt: skip
    assert set(find_splits("owner/name", HubSplits(valid="train[:5]"))) == {"valid", "test"}
    both = HubSplits(train="train[5:]", valid="train[:5]")
    assert find_splits("owner/name", both) == {
        "train": "train[5:]", "valid": "train[:5]", "test": "test",
    }  # fmt: skip
    for wrong in ("other[:5]", "train[5]", "train[:5", "train[a:]"):
        with pytest.raises(FpoError, match="no split .* it has train, test"):
            find_splits("owner/name", HubSplits(train=wrong))


def test_a_hub_that_cannot_be_reached_is_a_plain_error(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(FpoError, match="cannot be read: no route to host\\. Check the name"):
        read_split("owner/name")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps(text).encode()))
def test_any_bytes_give_rows_or_a_data_error(tmp_path, content):
    file = tmp_path / "train.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError):  # too short to hold a pair
        read_split(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.integers(0, 300), st.binary(min_size=1, max_size=3))
@example(0, b"BZh")  # the damage may be the mark of a packed file: no row to name
@example(0, b"PK")
def test_a_damaged_file_gives_rows_or_a_data_error(tmp_path, at, damage):
    content = lines(FEEDBACK, PAIR).encode()
    file = tmp_path / "train.jsonl"
    file.write_bytes(content[:at] + damage + content[at + len(damage) :])
    try:
        rows = read_split(file)
    except DataError as error:
        assert error.faults or str(file) in str(error)  # noqa: PT017
        return
    assert len(rows) == len(list(iterate_raw(file, "train")))
