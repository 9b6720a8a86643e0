"""Local files as people have them: read as the rows they hold, or refused for what they are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time

import pytest

from fpo_mlx.data import Columns, HubSplits, find_splits, iterate_raw, read_split
from fpo_mlx.data.containers import file_rows
from fpo_mlx.errors import ConfigError, DataError, FpoError
from fpo_mlx.records import PairFacts

ROWS = [{"prompt": f"Q{n}, é\n?", "chosen": "A", "rejected": "B"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(rows):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def as_csv(mark=","):
    cells = [["prompt", "chosen", "rejected"], *([r["prompt"], "A", "B"] for r in ROWS)]
    return "".join(mark.join(f'"{cell}"' for cell in row) + "\r\n" for row in cells)


def parquet(path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(ROWS), path)


def arrow(path):
    import pyarrow

    with pyarrow.ipc.new_stream(str(path), table(ROWS).schema) as sink:
        sink.write_table(table(ROWS))


def arrow_file(path):
    import pyarrow

    with pyarrow.ipc.new_file(str(path), table(ROWS).schema) as sink:
        sink.write_table(table(ROWS))


def zstd(content):
    import pyarrow

    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as sink:
        sink.write(content)
    return out.getvalue().to_pybytes()


def packed(make, pack):
    def packs(path):
        make(path)
        path.write_bytes(pack(path.read_bytes()))

    return packs


def write(content):
    return lambda path: path.write_bytes(content)


PRETTY = "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()
FILES = {
    "array.json": write(json.dumps(ROWS).encode()),
    "tall_array.json": write(json.dumps(ROWS, indent=1).encode()),
    "pretty.json": write(PRETTY),
    "wrapped.json": write(json.dumps({"version": 1, "data": ROWS}).encode()),
    "lines.json": write(LINES.encode()),
    "bom.jsonl": write(b"\xef\xbb\xbf" + LINES.encode()),
    "utf16.jsonl": write(LINES.encode("utf-16")),
    "utf16_without_mark.jsonl": write(LINES.encode("utf-16-le")),
    "utf32.jsonl": write(LINES.encode("utf-32")),
    "comma.csv": write(as_csv().encode()),
    "marked.csv": write(b"\xef\xbb\xbf" + as_csv().encode()),
    "semicolon.csv": write(as_csv(";").encode()),
    "tabs.tsv": write(as_csv("\t").encode()),
    "excel.csv": write(b"sep=;\r\n" + as_csv(";").encode()),
    "utf16.csv": write(as_csv().encode("utf-16")),
    "a.jsonl.gz": write(gzip.compress(LINES.encode())),
    "misnamed.jsonl": write(gzip.compress(LINES.encode())),
    "a.jsonl.bz2": write(bz2.compress(LINES.encode())),
    "a.jsonl.xz": write(lzma.compress(LINES.encode())),
    "a.csv.gz": write(gzip.compress(as_csv().encode())),
    "a.jsonl.zst": write(zstd(LINES.encode())),
    "a.parquet": parquet,
    "a.arrow": arrow,
    "a_file.arrow": arrow_file,
    "misnamed.arrow": parquet,
    "a.parquet.gz": packed(parquet, gzip.compress),
    "a.parquet.zst": packed(parquet, zstd),
    "misnamed.json": packed(parquet, lzma.compress),
    "a.arrow.zst": packed(arrow, zstd),
    "a_file.arrow.bz2": packed(arrow_file, bz2.compress),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_the_same_rows(tmp_path, name):
    FILES[name](tmp_path / name)
    rows = list(iterate_raw(tmp_path / name, "train"))
    assert [row.record for row in rows if "wrapped" not in name] == ROWS * ("wrapped" not in name)
    assert [(row.record["prompt"], row.index) for row in rows] == [
        (row["prompt"], at) for at, row in enumerate(ROWS)
    ]
    assert len({row.where for row in rows}) == 3
    assert all(row.where.startswith(name) for row in rows)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
REFUSED = {
    "broken.json": (b"[\n {\"prompt\": 1},\n {\"prompt\"\n]", "breaks at line 4, column 1"),
    "book.xlsx.jsonl": (b"PK\x03\x04 and so on", "a zip archive"),
    "left.jsonl": (POINTER, "Git LFS's pointer .* `git lfs pull`"),
    "left.parquet": (POINTER, "Git LFS's pointer .* `git lfs pull`"),
    "short.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "packed file is damaged"),
    "short.parquet.gz": (gzip.compress(b"PAR1 and more")[:-9], "packed file is damaged"),
    "bad.parquet.gz": (gzip.compress(b"PAR1 no more"), "cannot be read as a table"),
    "book.csv.gz": (gzip.compress(b"PK\x03\x04 and so on"), "a zip archive"),
    "bad.parquet": (b"PAR1 no more than this", "cannot be read as a table"),
    "latin.csv": ("prompt,chosen\né,b".encode("latin-1"), "is not UTF-8"),
    "latin.json": (f"[\n{LINES.replace('}', '},')}]".encode("latin-1"), r"is not UTF-8 \(line 2\)"),
    "open.csv": (b'prompt,chosen\nQ,A\n\nQ,"A\nand\nso on\n', "no CSV from line 4 to line 6"),
    "shut.csv": (b'prompt,chosen\nQ,"A"B\n', "no CSV at line 2"),
    "twice.csv": (b"prompt,chosen,rejected,chosen\nQ,A,B,C", "two columns are called 'chosen'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_one_message_that_says_what_it_is(tmp_path, name):
    content, said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(iterate_raw(tmp_path / name, "train"))
    assert caught.value.faults == ()


def test_a_csv_row_of_another_width_is_a_fault_of_that_row(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nQ,A,B\nQ,A\n")
    good, bad = list(iterate_raw(tmp_path / "a.csv", "train"))
    assert good.fault == ""
    assert bad.fault == "2 fields, but the first line names 3 columns"


@pytest.mark.parametrize("first", ["", "sep=,\n"])
def test_a_csv_row_over_several_lines_is_named_by_its_first(tmp_path, first):
    (tmp_path / "a.csv").write_text(f'{first}prompt,chosen\n"Q\n\nR",A\n\n"Q\nR"\nQ,B\n')
    rows = list(iterate_raw(tmp_path / "a.csv", "train"))
    lines = [2, 6, 8] if not first else [3, 7, 9]
    assert [row.where for row in rows] == [f"a.csv:{line}" for line in lines]
    assert rows[1].fault


def test_the_numbers_of_a_csv_count_and_a_word_among_them_is_refused_with_its_line(tmp_path):
    head = "prompt,chosen,rejected,weight,score_chosen,score_rejected\n"
    (tmp_path / "a.csv").write_text(f"{head}Q,A,B,0.5,3,1\nQ,A,C,,3,1\n")
    columns = Columns(scores=("score_chosen", "score_rejected"))
    rows = read_split(tmp_path / "a.csv", "train", columns)
    assert [row.facts for row in rows] == [PairFacts(1.0, 0.5, 2.0), PairFacts(1.0, 1.0, 2.0)]
    (tmp_path / "a.csv").write_text(f"{head}Q,A,B,0.5,3,1\nQ,A,C,high,3,1\n")
    with pytest.raises(DataError, match=r"a\.csv:3: weight is 'high', wanted a finite number"):
        read_split(tmp_path / "a.csv", "train")


def test_a_line_that_is_not_utf8_is_a_fault_also_where_it_is_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES.encode("latin-1"))
    faults = [row.fault for row in list(iterate_raw(tmp_path / "a.jsonl", "train"))]
    assert faults == [f"not UTF-8 (byte {LINES.index('é') + 1} of the line)"] * 3


def test_a_semicolon_within_a_columns_name_does_not_part_columns(tmp_path):
    (tmp_path / "a.csv").write_text('"prompt","rating; of; five; stars"\n"Q","1"\n')
    (row,) = list(iterate_raw(tmp_path / "a.csv", "train"))
    assert row.record == {"prompt": "Q", "rating; of; five; stars": "1"}


@pytest.mark.parametrize(
    "content",
    [lambda text: text.encode("utf-16"), lambda text: b'{"a\n' + text.encode()],
    ids=["utf16", "first line broken"],
)
def test_lines_cost_the_same_each_however_many_there_are(tmp_path, content):
    """Each copied all that came behind it."""

    def seconds(name):
        begun = time.process_time()
        assert sum(not row.fault for row in file_rows(tmp_path / name)) == 10_000
        return time.process_time() - begun

    text = json.dumps({"a": "b" * 500}) + "\n"
    text *= 10_000
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(content(text))
    assert seconds("a.jsonl") < 5 * seconds("plain.jsonl")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train.parquet", "validation.json"], {"train", "valid"}),
        (["train_prefs.jsonl", "test_prefs.jsonl"], {"train", "valid"}),
        (["Train.csv", "dev.csv", "test.csv"], {"train", "valid", "test"}),
        (["pairs.jsonl", "README.md"], {"train"}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], {"train"}),
        (["train/a.jsonl", "eval/b.jsonl"], {"train", "valid"}),
        # as `datasets` wrote them in 2022
        (["data/train-00000-of-00001-2a1df75c6bce91ab.jsonl",
          "data/test-00000-of-00001-0f1e2d3c4b5a6978.jsonl"], {"train", "test"}),
        ([f"train-{at}-of-2-2a1df75c6bce91a{at}.jsonl" for at in (0, 1)], {"train"}),
    ],
)  # fmt: skip
def test_splits_are_found_under_their_usual_names(tmp_path, names, found):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(as_csv() if name.endswith("csv") else LINES)
    assert set(find_splits(tmp_path)) == found
    parts = sum("train" in name.lower() or "pairs" in name for name in names)
    rows = read_split(tmp_path, "train")
    assert [row.index for row in rows] == list(range(3 * parts))


def test_two_files_of_one_split_are_refused_by_name(tmp_path):
    for name in ("train.json", "train.csv"):
        (tmp_path / name).write_text(LINES)
    with pytest.raises(FpoError, match=r"train\.csv, train\.json are all called train"):
        read_split(tmp_path)
    (tmp_path / "valid.jsonl").write_text(LINES)
    assert len(read_split(tmp_path, "valid")) == 3  # for which it does not matter
    assert set(find_splits(tmp_path)) == {"train", "valid"}
    with pytest.raises(FpoError, match=r"Splits found in .*: train \(several\), valid \("):
        read_split(tmp_path, "test")
    (tmp_path / "train.jsonl").write_text(LINES)  # what it always was
    assert find_splits(tmp_path)["train"] == tmp_path / "train.jsonl"


@pytest.mark.parametrize(
    "names",
    [["0-of-3", "2-of-3"], ["1-of-2"], ["0-of-1", "0-of-2", "1-of-2"], ["0-of-2", "7"],
     ["0-of-3-2a1df75c6bce91ab", "2-of-3-0f1e2d3c4b5a6978"]],
)  # fmt: skip
def test_parts_that_are_not_all_there_once_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / f"train-{name}.jsonl").write_text(LINES)
    with pytest.raises(FpoError, match=rf"are not all parts of one file: {len(names)} of "):
        read_split(tmp_path)
    (tmp_path / "valid.jsonl").write_text(LINES)
    assert len(read_split(tmp_path, "valid")) == 3


def test_what_a_later_map_left_in_a_saved_folder_is_no_row(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    datasets.load_from_disk(tmp_path).map(lambda row: {**row, "chosen": "mapped"})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert [row.record for row in list(iterate_raw(tmp_path, "train"))] == ROWS


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "validation": whole}).save_to_disk(tmp_path / "both")
    assert [row.record for row in list(iterate_raw(tmp_path / "one", "train"))] == ROWS
    assert set(find_splits(tmp_path / "both")) == {"train", "valid"}
    assert [row.record for row in list(iterate_raw(tmp_path / "both", "valid"))] == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_turns_that_datasets_keeps_as_json_are_read_as_the_turns_they_are(tmp_path, name):
    """Its version 5 writes turns of unlike keys so, by default of `map`: one with a tool call."""
    datasets = pytest.importorskip("datasets", minversion="5.0")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "[1]"}]
    called = [said[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"chosen": called, "rejected": said, "note": {"of": [[{"a": "1"}, 2]]}}
    numbers = datasets.Dataset.from_dict({"at": range(3)})
    made = numbers.map(lambda _: json.loads(json.dumps(row)), remove_columns=["at"])
    assert "'chosen': List(Json" in str(made.features), "what this test is about"
    made.to_parquet(tmp_path / "a.parquet") if "." in name else made.save_to_disk(tmp_path / name)
    read = list(iterate_raw(tmp_path / name, "train"))
    assert [one.record for one in read] == list(made) == [row] * 3
    assert read_split(tmp_path / name)[0].chosen[0]["tool_calls"][0]["function"]["name"] == "f"


def test_a_subset_of_local_data_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    with pytest.raises(ConfigError, match="--subset english"):
        read_split(tmp_path, hub=HubSplits(subset="english"))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_name_for_a_split_of_what_is_one_split_is_refused(tmp_path, split):
    import datasets

    (tmp_path / "pairs.jsonl").write_text(LINES)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "pairs.jsonl", tmp_path / "saved"):
        for want in ("train", "valid"):
            with pytest.raises(ConfigError, match=f"--{split}-split dev: .*{source.name} is one"):
                find_splits(source, HubSplits(**{split: "dev"}), want=want)


def test_several_configurations_are_listed_with_the_option(monkeypatch):
    import datasets

    def fail(*_):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _: ["english", "german"])
    with pytest.raises(FpoError, match="several configurations: english, german.*--subset NAME"):
        read_split("owner/name")
