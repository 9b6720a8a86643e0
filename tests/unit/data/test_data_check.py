"""The data doctor finds what would waste a run, says it in one line, and writes the clean set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, build_tiny_tokenizer

import fpo_mlx.data
from fpo_mlx.data import RawRow, check_data, iterate_raw, read_split, write_clean
from fpo_mlx.data.check import LEVELS
from fpo_mlx.data.findings import Finding, by_kind
from fpo_mlx.data.oddities import odd_text
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import FpoError

PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def raw(*records, name="train"):
    return [RawRow(r, f"{name}.jsonl:{n}", n - 1) for n, r in enumerate(records, start=1)]


def check(*records, tokenizer=None, max_seq_length=None):
    return check_data({"train": raw(*records)}, tokenizer, max_seq_length)


def test_good_rows_give_no_findings(tokenizer):
    report = check(PAIR, {**PAIR, "prompt": "R"}, tokenizer=tokenizer, max_seq_length=512)
    assert report.findings == ()
    assert report.refused == 0
    (train,) = report.splits.values()
    assert (train.rows, train.refused, train.clean, train.longer_chosen) == (2, 0, 2, 0.5)


def user(text):
    return {"role": "user", "content": text}


SWAPPED = {"prompt": "Q", "chosen": "B", "rejected": "A"}
# (record beside a good one, kind, the line that a user sees)
CASES = [
    (None, "unreadable", "train.jsonl:2: not JSON: Expecting value at character 1"),
    ({"prompt": "Q", "chosen": "A"}, "missing field", "train.jsonl:2: no 'rejected' (the row has:"),
    ({**PAIR, "chosen": " "}, "empty field", "train.jsonl:2: chosen is empty"),
    ({**PAIR, "chosen": 3}, "wrong type", "train.jsonl:2: chosen is a number but rejected is"),
    ({**PAIR, "prompt": [user("Q"), user("R")]}, "role order", "'user' comes after 'user'"),
    (
        {"chosen": [user("Q")], "rejected": [user("R")]},
        "no shared prompt",
        "train.jsonl:2: the conversations in chosen and rejected differ from their first",
    ),
    ({**PAIR, "rejected": "A"}, "same response", "train.jsonl:2: chosen and rejected are the same"),
    ({**PAIR, "chosen": "\udc00"}, "broken text", "chosen has half a surrogate pair"),
    (PAIR, "duplicate", "train.jsonl:2: the same pair as train.jsonl:1"),
    (SWAPPED, "contradiction", "train.jsonl:1: chosen and rejected are the other way round in"),
    (
        {**PAIR, "prompt": "x" * 99},
        "dropped",
        "train.jsonl:2: the prompt has 112 tokens and leaves no room for a response within 64",
    ),
    ({**PAIR, "chosen": "x" * 99}, "cut", "train.jsonl:2: chosen is cut from 101 to 50 tokens"),
    (
        {**PAIR, "chosen": "x" * 90 + "A", "rejected": "x" * 90},
        "same after cut",
        "train.jsonl:2: cut at 64 tokens, chosen and rejected are the same",
    ),
    (
        {**PAIR, "chosen": "A<|im_end|>more"},
        "control token",
        "train.jsonl:2: chosen has <|im_end|> in its text, which is read as a command",
    ),
    (
        {**PAIR, "chosen": "a\u200bb"},
        "odd unicode",
        "train.jsonl:2: chosen has U+200B (ZERO WIDTH SPACE) at character 2",
    ),
]


@pytest.mark.parametrize(("record", "kind", "said"), CASES)
def test_each_bad_row_gets_one_line(tokenizer, record, kind, said):
    rows = raw(PAIR, record)
    if record is None:
        rows[1] = RawRow(None, "train.jsonl:2", 1, "not JSON: Expecting value at character 1")
    report = check_data({"train": rows}, tokenizer, 64)
    lines = [line for line in map(str, by_kind(report.findings)) if f" {kind} " in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert lines[0].startswith(LEVELS[kind])
    refused = LEVELS[kind] == "refused"
    assert report.refused == int(refused)
    assert len(report.clean["train"]) == {"refused": 1, "excluded": 1, "warning": 2}[
        LEVELS[kind]
    ] - (
        kind == "contradiction"  # nobody knows which of the two is right: both go
    )


def test_the_template_is_checked(tmp_path):
    def kinds(template, record=PAIR):
        tokenizer = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))
        report = check(record, tokenizer=tokenizer)
        return [(finding.kind, str(finding)) for finding in report.findings]

    rewrites = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    ((kind, said),) = kinds(rewrites)
    assert kind == "prompt not a prefix"
    assert said.startswith("train.jsonl:1: the rendered prompt is not how")
    ((kind, said),) = kinds("{{ raise_exception('No system here') }}")
    assert kind == "template"
    assert said.endswith("No system here")
    long = {"prompt": "Q", "chosen": "a much longer answer", "rejected": "another long answer"}
    assert kinds(CHATML, long) == []
    endless = CHATML.replace("<|im_end|>", "")
    assert [kind for kind, _ in kinds(endless)] == ["no end of turn"] * 2


def test_prompts_in_two_splits_are_leakage_and_the_training_copy_goes():
    splits = {
        "test": raw({**PAIR, "prompt": "Two"}, name="test"),
        "train": raw({**PAIR, "prompt": "one  TWO"}, PAIR, {**PAIR, "prompt": "two"}),
        "valid": raw({**PAIR, "prompt": "One two", "chosen": "C"}, name="valid"),
    }
    report = check_data(splits)
    assert [(f.kind, str(f)) for f in report.findings] == [
        ("leakage", "train.jsonl:1: its prompt is also in valid.jsonl:1"),
        ("leakage", "train.jsonl:3: its prompt is also in test.jsonl:1"),
    ]
    assert list(report.clean) == ["train", "valid", "test"]
    assert report.clean["train"] == [PAIR]
    assert [len(rows) for rows in report.clean.values()] == [1, 1, 1]


def test_length_bias_is_told_only_when_it_is_large_and_no_accident():
    def findings(longer, total):
        rows = [
            {"prompt": str(n), "chosen": "a" * (3 if n < longer else 1), "rejected": "bb"}
            for n in range(total)
        ]
        return [f.what for f in check(*rows).findings]

    assert findings(9, 9) == ["chosen is the longer response in 100% of 9 pairs; the model may "
                              "learn length instead of the preference (objectives that normalise "
                              "by length help)"]  # fmt: skip
    assert findings(8, 8) == []  # 0.5 * 2 * sqrt(8) = 2.8 standard errors
    assert findings(590, 1000) == []  # sure, but small
    assert findings(610, 1000)[0].startswith("chosen is the longer response in 61% of 1000")
    assert findings(300, 1000)[0].startswith("chosen is the shorter response in 70% of 1000")


def test_the_summary_counts_tokens_or_characters(tokenizer):
    record = {**PAIR, "chosen": "xyz"}
    assert check(record).splits["train"].chosen_length == 3
    summary = check(record, tokenizer=tokenizer).splits["train"]
    assert (summary.chosen_length, summary.rejected_length) == (5, 3)  # <|im_end|> and a newline


def test_kinds_are_said_with_the_most_severe_first():
    found = [*check(PAIR, PAIR, {}).findings, Finding("cut", "train", "train.jsonl:1", "cut")]
    levels = [kind.first.level for kind in by_kind(found[::-1])]
    assert levels == ["refused", "excluded", "warning"]
    assert list(dict.fromkeys(LEVELS.values())) == levels  # by_kind goes through LEVELS in order


def test_the_report_is_plain_json(tokenizer):
    report = check(PAIR, {}, PAIR, tokenizer=tokenizer, max_seq_length=512)
    content = json.loads(json.dumps(report.as_dict()))
    assert content["refused"] == 1
    assert content["kinds"] == {"missing field": 1, "duplicate": 1}
    assert content["splits"]["train"] == {
        "rows": 3, "refused": 1, "clean": 1, "chosen_length": 3.0, "rejected_length": 3.0,
        "longer_chosen": 0.5,
    }  # fmt: skip
    assert content["findings"][1] == {
        "kind": "duplicate", "split": "train", "where": "train.jsonl:3",
        "what": "the same pair as train.jsonl:1", "level": "excluded",
    }  # fmt: skip


def test_rows_that_differ_in_their_tools_are_no_duplicates():
    tools = [[{"type": "function", "function": {"name": name}}] for name in "ab"]
    same, other = ({**PAIR, "tools": t} for t in tools)
    assert not [f for f in check(same, other).findings if f.kind == "duplicate"]
    assert [f for f in check(same, same).findings if f.kind == "duplicate"]


def test_the_clean_set_is_read_without_a_fault_and_has_no_findings(tmp_path, tokenizer):
    keep = {**PAIR, "note": "é \ud800", "prompt": "Kept"}
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [json.dumps(r) for r in (PAIR, keep, {}, {**PAIR, "chosen": "C", "prompt": "V"}, PAIR)]
    (folder / "train.jsonl").write_text("\n".join([*rows, "{"]))
    (folder / "valid.jsonl").write_text(json.dumps({**PAIR, "prompt": "v"}))
    report = check_data(
        {split: list(iterate_raw(folder, split)) for split in ("train", "valid")}, tokenizer, 512
    )
    assert report.refused == 2
    out = tmp_path / "out" / "clean"
    assert write_clean(report.clean, out) == [out / "train.jsonl", out / "valid.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl", "valid.jsonl"]
    assert [json.loads(line) for line in (out / "train.jsonl").read_text().split("\n")[:-1]] == [
        PAIR,
        keep,
    ]
    assert len(read_split(out, "train")) == 2
    again = check_data(
        {"train": list(iterate_raw(out, "train")), "valid": list(iterate_raw(out, "valid"))}
    )
    assert again.findings == ()


def test_a_clean_set_that_cannot_be_written_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.jsonl").mkdir()  # in the way of the file
    with pytest.raises(FpoError, match="cannot be written: Is a directory"):
        write_clean({"train": [PAIR]}, out)
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain\ttext\r\nwith “quotes”, 你好, العربية, 👩‍👩‍👧 and é", None),
        ("São Paulo, ÂME, 20 °C", None),
        ("a\x00b\x07", "U+0000 (a control or private character) at character 2 and 1 more"),
        ("bad \ufffd", "U+FFFD (REPLACEMENT CHARACTER) at character 5"),
        ("\u202eabc", "U+202E (RIGHT-TO-LEFT OVERRIDE) at character 1"),
        ("hi\U000e0041", "U+E0041 (TAG LATIN CAPITAL LETTER A) at character 3"),
        ("donâ€™t", "'â€™' at character 4 looks like wrongly read UTF-8"),
        ("cafÃ©", "'Ã©' at character 4 looks like wrongly read UTF-8"),
    ],
)
def test_odd_text_is_told_from_the_worlds_scripts(text, said):
    assert odd_text(text) == said


def test_every_kind_of_fault_in_the_source_has_a_level():
    source = "".join(p.read_text() for p in Path(fpo_mlx.data.__file__).parent.glob("*.py"))
    kinds = set(re.findall(r'RowFault\(\s*"([^"]+)"', source))
    assert len(kinds) >= 8
    assert {LEVELS[kind] for kind in kinds} == {"refused"}


FIELD = st.one_of(
    st.none(), st.integers(), st.text(max_size=8), st.sampled_from(["A", "B", "<|im_end|>"])
)
RECORD = st.fixed_dictionaries({"prompt": FIELD, "chosen": FIELD, "rejected": FIELD})


@settings(max_examples=60)
@given(st.lists(RECORD, max_size=4), st.lists(RECORD, max_size=2), st.integers(2, 40))
def test_no_rows_make_the_check_fail_and_its_clean_set_is_clean(tokenizer, train, valid, length):
    splits = {"train": raw(*train), "valid": raw(*valid, name="valid")}
    report = check_data(splits, tokenizer, length)
    json.dumps(report.as_dict())
    assert report.refused == sum(LEVELS[f.kind] == "refused" for f in report.findings)
    again = check_data(
        {name: raw(*rows, name=name) for name, rows in report.clean.items()}, tokenizer, length
    )
    assert {finding.level for finding in again.findings} <= {"warning"}
