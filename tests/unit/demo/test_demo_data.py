"""The demo's preference pairs are what their README says: well formed, brief against padded,
and held out where they claim to be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import fpo_mlx

FOLDER = Path(fpo_mlx.__file__).parent / "demo" / "data"
SPLITS = ("train", "valid")


def rows_of(split: str) -> list[dict[str, str]]:
    text = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text.lower())


# Words that say nothing about what a prompt is about; the question words and verbs of asking too.
FILLER = frozenset(
    words(
        "a an the is are was were do does did can could should of in on to for from with and or at "
        "by i my me it this that what what's why who when where which how one has have make give "
        "write tell name explain define word sentence mean difference between good best way"
    )
)


def topic(prompt: str) -> frozenset[str]:
    return frozenset(words(prompt)) - FILLER


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_three_trimmed_non_empty_strings(split: str) -> None:
    for number, row in enumerate(rows_of(split), 1):
        assert sorted(row) == ["chosen", "prompt", "rejected"], f"{split}:{number}"
        for key, text in row.items():
            assert isinstance(text, str), f"{split}:{number} {key}"
            assert text, f"{split}:{number} {key}"
            assert text == text.strip(), f"{split}:{number} {key}"


def test_train_has_at_least_220_rows_and_valid_has_40() -> None:
    assert len(rows_of("train")) >= 220
    assert len(rows_of("valid")) == 40


def test_the_readme_states_the_real_number_of_rows() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"(\d+) rows in `train.jsonl` and (\d+) in `valid.jsonl`", readme)
    assert stated is not None
    assert [int(n) for n in stated.groups()] == [len(rows_of(split)) for split in SPLITS]


def test_no_prompt_or_answer_occurs_twice() -> None:
    rows = rows_of("train") + rows_of("valid")
    for key in ("prompt", "chosen", "rejected"):
        counts = Counter(" ".join(words(row[key])) for row in rows)
        assert [text for text, n in counts.items() if n > 1] == []


def test_no_held_out_prompt_shares_most_of_its_topic_words_with_a_training_prompt() -> None:
    train = [row["prompt"] for row in rows_of("train")]
    close = [
        (prompt, other)
        for prompt in (row["prompt"] for row in rows_of("valid"))
        for other in train
        if len(topic(prompt) & topic(other)) * 2 >= min(len(topic(prompt)), len(topic(other)))
    ]
    assert close == []


@pytest.mark.parametrize("split", SPLITS)
def test_chosen_is_brief_and_rejected_is_longer_within_the_stated_words(split: str) -> None:
    for row in rows_of(split):
        chosen, rejected = len(row["chosen"].split()), len(row["rejected"].split())
        assert 10 <= chosen <= 45, row["prompt"]
        assert 35 <= rejected <= 80, row["prompt"]
        assert rejected > chosen, row["prompt"]


def test_at_most_four_rejected_answers_share_their_first_three_words() -> None:
    rows = rows_of("train") + rows_of("valid")
    openings = Counter(tuple(words(row["rejected"])[:3]) for row in rows)
    assert [opening for opening, n in openings.items() if n > 4] == []


def test_about_a_tenth_of_the_chosen_answers_are_a_list_code_or_arithmetic() -> None:
    rows = rows_of("train") + rows_of("valid")
    short = [r for r in rows if re.search(r"\n(\d\.|-) |`[^`]+`| = \d", r["chosen"])]
    assert 0.08 <= len(short) / len(rows) <= 0.15


def test_no_chosen_answer_opens_with_a_preamble_or_closes_with_an_offer() -> None:
    preamble = re.compile(r"(certainly|sure|of course|absolutely|great question|as an ai)\b")
    offer = re.compile(r"(let me know|feel free|happy to help|hope this helps|hesitate)")
    for row in rows_of("train") + rows_of("valid"):
        text = row["chosen"].lower()
        assert preamble.match(text) is None, row["prompt"]
        assert offer.search(text) is None or text.startswith('"'), row["prompt"]
