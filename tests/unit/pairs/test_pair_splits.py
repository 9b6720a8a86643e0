"""Which prompts are held back from the pairs that are built."""

from __future__ import annotations

import json

import pytest
from judges import candidates

from fpo_mlx.pairs.choose import split_of
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pipeline import pairs_build, pairs_judge

IDS = [f"{n}" for n in range(200)]


def test_splits_are_by_prompt_and_of_the_share_that_was_asked_for():
    splits = split_of([*IDS, *IDS], IDS, 0.1, 0.05, 0)
    assert list(splits.values()).count("valid") == 20
    assert list(splits.values()).count("test") == 10
    assert split_of(IDS[::-1], IDS, 0.1, 0.05, 0) == splits
    assert split_of(IDS, IDS, 0.1, 0.05, 1) != splits


@pytest.mark.parametrize("of", [3, 7])
def test_a_prompt_is_in_the_same_split_whichever_of_the_others_make_pairs(of):
    """It went by those that did: a round was validated on what an earlier one had trained on."""
    whole = split_of(IDS, IDS, 0.1, 0.05, 0)
    some = split_of(IDS[::of], IDS, 0.1, 0.05, 0)
    assert some == {id: whole[id] for id in IDS[::of]}
    assert set(some.values()) == {"train", "valid", "test"}


@pytest.mark.parametrize("held", ["train", "valid", "test"])
def test_every_split_gets_one_prompt_where_only_those_of_one_make_pairs(held):
    whole = split_of(IDS, IDS, 0.1, 0.05, 0)
    some = split_of([id for id in IDS if whole[id] == held][:4], IDS, 0.1, 0.05, 0)
    assert len(some) == 4
    assert set(some.values()) == {"train", "valid", "test"}


def test_of_one_prompt_nothing_is_held_back_and_of_two_the_validation():
    assert split_of([], IDS, 0.5, 0.0, 0) == {}
    assert split_of(["a"], ["a"], 0.5, 0.0, 0) == {"a": "train"}
    assert sorted(split_of(["a", "b"], ["a", "b"], 0.5, 0.2, 0).values()) == ["train", "valid"]
    assert sorted(split_of(["a", "b"], ["a", "b"], 0.9, 0.0, 0).values()) == ["train", "valid"]
    assert set(split_of(IDS, IDS, 0.0, 0.0, 0).values()) == {"train"}


def test_a_build_holds_the_same_prompts_back_whichever_were_judged(tmp_path):
    answers = {f"Q{id}?": [f"{id}", f"{id} at length"] for id in IDS}
    source = candidates(tmp_path / "c.jsonl", answers)
    verdicts = tmp_path / "v.jsonl"
    pairs_judge(JudgeConfig(reward="brevity"), candidates=source, output=verdicts, say=print)
    held = []
    for part in (1, 2):
        some = tmp_path / f"{part}.jsonl"
        some.write_text("".join(verdicts.read_text().splitlines(keepends=True)[::part]))
        out = tmp_path / f"pairs-{part}"
        settings = BuildConfig(near_duplicates=1.0)
        pairs_build(settings, candidates=source, verdicts=[some], output=out, say=print)
        rows = (out / "valid.jsonl").read_text().splitlines()
        held.append({json.loads(row)["id"] for row in rows})
    assert len(held[0]) == 20
    assert held[1] == held[0] & {f"Q{id}?" for id in IDS[::2]}
