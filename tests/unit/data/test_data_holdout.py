"""A share of the training prompts stands in for a validation split, the same in every reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fpo_mlx.data import (
    Columns,
    HubSplits,
    content_key,
    find_place,
    find_splits,
    iterate_raw,
    read_split,
)
from fpo_mlx.errors import ConfigError, DataError, FpoError

FIFTH = HubSplits(valid_share=0.2)


def row(prompt: object, n: int = 0, **more: object) -> dict:
    return {"prompt": prompt, "chosen": f"A {n}", "rejected": f"B {n}", **more}


def file_of(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def prompts(rows) -> list[str]:
    return [one.prompt[-1]["content"] for one in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.5))
def test_every_row_is_on_one_side_and_no_prompt_on_both(tmp_path, numbers, share):
    path = file_of(tmp_path / "pairs.jsonl", [row(f"P {p}?", n) for n, p in enumerate(numbers)])
    hub = HubSplits(valid_share=share)
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match="no two different prompts"):
            read_split(path, "valid", hub=hub)
        return
    sides = [read_split(path, split, hub=hub) for split in ("train", "valid")]
    assert all(sides)
    where = [one.where for side in sides for one in side]
    assert sorted(where) == sorted(f"pairs.jsonl:{n + 1}" for n in range(len(numbers)))
    assert not set(prompts(sides[0])) & set(prompts(sides[1]))
    for side in sides:
        assert [one.index for one in side] == list(range(len(side)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.integers(20, 60), st.integers(1, 60), st.floats(0.1, 0.5), st.floats(0.1, 0.5))
def test_no_prompt_changes_sides_where_rows_are_added_or_the_share_grows(
    tmp_path, before, more, one, other
):
    """The cut was by rank, so that prompts went over as the file grew, and nothing said so."""
    rows, held = [row(f"P {n}?", n) for n in range(before + more)], {}
    for name, count in (("old", before), ("new", before + more)):
        for share in sorted({one, other}):
            path = file_of(tmp_path / f"{name}.jsonl", rows[:count])
            found = read_split(path, "valid", hub=HubSplits(valid_share=share))
            held[name, share] = set(prompts(found))
    least, most = min(one, other), max(one, other)
    for share in (least, most):
        if len(held["old", share]) > 1:  # one is held back whatever its hash
            assert held["old", share] == held["new", share] & {f"P {n}?" for n in range(before)}
    assert held["new", least] <= held["new", most]


def test_of_many_prompts_about_the_share_is_held_back(tmp_path):
    path = file_of(tmp_path / "pairs.jsonl", [row(f"P {n}?", n) for n in range(4000)])
    assert len(read_split(path, "valid", hub=HubSplits(valid_share=0.05))) == pytest.approx(
        200, rel=0.2
    )


def test_one_prompt_in_other_letters_or_below_a_system_message_goes_together(tmp_path):
    rows = [row(f"Why {n}?", n) for n in range(20)]
    rows += [row(f"WHY  {n}?", n, system="Be brief.") for n in range(20)]
    path = file_of(tmp_path / "pairs.jsonl", rows)
    held = {p.casefold().replace("  ", " ") for p in prompts(read_split(path, "valid", hub=FIFTH))}
    kept = {p.casefold().replace("  ", " ") for p in prompts(read_split(path, "train", hub=FIFTH))}
    assert len(held) == 4
    assert not held & kept


def test_the_prompts_are_found_by_the_names_of_the_columns(tmp_path):
    rows = [{"q": f"P {n // 2}", "a": f"A{n}", "b": f"B{n}"} for n in range(20)]
    path, columns = file_of(tmp_path / "pairs.jsonl", rows), Columns("q", "a", "b")
    sides = [set(prompts(read_split(path, s, columns, FIFTH))) for s in ("train", "valid")]
    assert [len(side) for side in sides] == [8, 2]
    raw = {one.record["q"] for one in iterate_raw(path, "valid", FIFTH, columns)}
    assert raw == sides[1]


def test_a_folder_keeps_its_test_and_a_file_has_none(tmp_path):
    rows = [row(f"P {n}", n) for n in range(10)]
    path = file_of(tmp_path / "train.jsonl", rows)
    assert set(find_splits(tmp_path, FIFTH)) == set(find_splits(path, FIFTH, "test"))
    with pytest.raises(FpoError, match="no test split, and with --valid-share 0.2"):
        read_split(path, "test", hub=FIFTH)
    with pytest.raises(FpoError, match="no test split, and with --valid-share 0.2"):
        content_key(path, "test", FIFTH)  # or tokens of the whole file would be taken
    file_of(tmp_path / "test.jsonl", [row("T")])
    assert set(find_splits(tmp_path, FIFTH)) == {"train", "valid", "test"}
    assert prompts(read_split(tmp_path, "test", hub=FIFTH)) == ["T"]
    assert find_place(tmp_path, "valid", FIFTH) == find_place(tmp_path, "train", FIFTH) == path


@pytest.mark.parametrize("name", ["valid", "test_prefs"])
def test_a_validation_split_of_its_own_is_refused_with_what_to_do(tmp_path, name):
    file_of(tmp_path / "train.jsonl", [row(f"P {n}", n) for n in range(10)])
    file_of(tmp_path / f"{name}.jsonl", [row("V")])
    for split in ("train", "valid", "test"):
        with pytest.raises(ConfigError, match="validation split of its own"):
            read_split(tmp_path, split, hub=FIFTH)
    assert prompts(read_split(tmp_path, "valid", hub=HubSplits())) == ["V"]


def test_test_prefs_that_is_named_as_the_test_leaves_room_for_a_share(tmp_path):
    file_of(tmp_path / "train.jsonl", [row(f"P {n}", n) for n in range(10)])
    file_of(tmp_path / "test_prefs.jsonl", [row("T")])
    hub = HubSplits(test="test_prefs", valid_share=0.2)
    assert len(read_split(tmp_path, "valid", hub=hub)) == 2
    assert prompts(read_split(tmp_path, "test", hub=hub)) == ["T"]


def test_what_is_kept_by_content_tells_shares_and_sides_apart(tmp_path):
    path = file_of(tmp_path / "pairs.jsonl", [row(f"P {n}", n) for n in range(10)])
    asked = [(s, HubSplits(valid_share=x)) for s in ("train", "valid") for x in (0.0, 0.1, 0.2)]
    keys = {content_key(path, split, hub) for split, hub in asked}
    assert len(keys) == 5  # without a share both are the file


def test_a_row_that_cannot_be_read_is_refused_in_training(tmp_path):
    path = file_of(tmp_path / "pairs.jsonl", [row(f"P {n}", n) for n in range(9)] + [{"x": 1}])
    assert len(read_split(path, "valid", hub=FIFTH)) == 2
    with pytest.raises(DataError, match="pairs.jsonl:10"):
        read_split(path, "train", hub=FIFTH)
