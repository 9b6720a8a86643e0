"""Several judges in the files of verdicts: which of them `pairs build` listens to."""

from __future__ import annotations

import json

import pytest
from judges import candidates, graded

from fpo_mlx.pairs.records import PERSON, Verdict, open_candidates
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pipeline import pairs_build, pairs_judge

PROMPTS = 6


def written(path, judge, score, *, time=None, only=None):
    """Verdicts of a reward on the answers of two grades, written behind those that are there."""
    found = open_candidates(path)
    with open(path.with_name("v.jsonl"), "a") as out:
        for number, one in enumerate(found):
            if only is None or number < only:
                a, b = (score(int(c.text.split()[-1])) for c in one.candidates)
                side = "a" if a > b else "b"
                made = Verdict(
                    one.id, 0, 1, "none", side, judge, score_a=a, score_b=b, time=time,
                    texts=one.texts(0, 1),
                )  # fmt: skip
                out.write(json.dumps(made.as_dict()) + "\n")
    return path.with_name("v.jsonl")


def built(path, verdicts, reward=None, **settings):
    """(last words of the chosen answers and their scores, report, what was said)."""
    said = []
    config = BuildConfig(valid_share=0.0, near_duplicates=1.0, force=True, **settings)
    output = path.with_name("pairs")
    report = pairs_build(
        config, candidates=path, verdicts=verdicts, reward=reward, output=output, overwrite=True,
        say=said.append,
    )  # fmt: skip
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    chosen = [(row["chosen"][0]["content"].split()[-1], row["score_chosen"]) for row in rows]
    return chosen, report, "\n".join(said)


def test_a_reward_that_was_mended_is_not_outvoted_by_what_it_said_before(tmp_path):
    """Two judges have to agree, so the one that was thrown away took the new one's pairs."""
    path, reward = candidates(tmp_path / "c.jsonl", graded(PROMPTS)), tmp_path / "my.py"
    words = {"candidates": path, "output": tmp_path / "v.jsonl", "say": print}
    for factor in (-5, 1):
        reward.write_text(f"def grade(prompt, answer):\n    return {factor} * int(answer[-1])\n")
        judged = pairs_judge(JudgeConfig(reward=f"{reward}:grade"), **words)
    chosen, report, said = built(path, [tmp_path / "v.jsonl"])
    assert chosen == [("1", 1.0)] * PROMPTS
    assert [*report.judges] == [judged.judge]
    assert report.left["verdicts of another judge of the same name"] == PROMPTS
    assert f"of this name the one that judged last counts, {judged.judge}" in said
    assert "--judge-name" in said


def test_the_newest_of_a_name_is_the_one_that_spoke_last_on_these_answers(tmp_path):
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    written(path, "reward:grade@00000002", lambda grade: grade, time=2.0)
    verdicts = written(path, "reward:grade@00000001", lambda grade: -grade, time=1.0)
    with open(verdicts, "a") as out:  # of other candidates
        there = json.loads(verdicts.read_text().splitlines()[-1])
        out.write(json.dumps(there | {"id": "another", "time": 9.0}) + "\n")
    assert built(path, [verdicts])[0] == [("1", 1.0)] * PROMPTS
    chosen, _, said = built(path, [verdicts], judge_name="reward:grade@00000001")
    assert chosen == [("0", 0.0)] * PROMPTS
    assert "of this name" not in said


@pytest.mark.parametrize("chosen", [None, "the other"])
def test_the_reward_that_build_is_given_counts_though_another_version_judged_last(tmp_path, chosen):
    """It had nothing new to say, so it was left out for the one that it had taken the place of."""
    path, reward = candidates(tmp_path / "c.jsonl", graded(PROMPTS)), tmp_path / "my.py"
    asked, other, names = f"{reward}:grade", tmp_path / "v.jsonl", []
    for factor, output in ((1, tmp_path / "c-rewards.jsonl"), (-5, other), (1, None)):
        reward.write_text(f"def grade(prompt, answer):\n    return {factor} * int(answer[-1])\n")
        if output:
            words = {"candidates": path, "output": output, "say": print}
            names.append(pairs_judge(JudgeConfig(reward=asked), **words).judge)
    named = names[1] if chosen else None  # which counts before --reward
    best, report, said = built(path, [other], reward=asked, judge_name=named)
    assert best == ([("0", 0.0)] if chosen else [("1", 1.0)]) * PROMPTS
    assert [*report.judges] == [named or names[0]]
    if not chosen:
        line = f"{names[1]} is left out: of this name the one of --reward counts, {names[0]}"
        assert line in said


def test_verdicts_without_a_time_are_as_new_as_they_stand_in_the_file(tmp_path):
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    for version, sign in (("0000000a", -1), ("0000000b", 1)):
        verdicts = written(path, f"features:{version}", lambda grade, sign=sign: sign * grade)
    assert built(path, [verdicts])[0] == [("1", 1.0)] * PROMPTS


def test_judges_of_different_names_count_together_and_that_is_said(tmp_path):
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    written(path, "small@00000001", lambda grade: grade)
    verdicts = written(path, "large@00000002", lambda grade: -grade, only=2)
    chosen, report, said = built(path, [verdicts])
    assert len(chosen) == PROMPTS - 2
    assert report.left["tie"] == 2
    assert "2 judges count, small@00000001, large@00000002" in said
    assert "more than half of those that judged two answers" in said
    assert "--judge-name" in said


def test_one_judge_is_not_spoken_of(tmp_path):
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    said = built(path, [written(path, "small@00000001", lambda grade: grade)])[2]
    assert "count" not in said


def test_a_person_s_votes_stand_beside_the_judge_that_is_named(tmp_path):
    """--judge-name left them out without a word, so nobody with votes could leave a judge out."""
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    written(path, "small@00000001", lambda grade: grade)
    written(path, "large@00000002", lambda grade: -grade)
    verdicts = written(path, PERSON, lambda grade: -grade, only=2)
    chosen, _, said = built(path, [verdicts], judge_name="small@00000001")
    assert sorted(chosen) == [("0", 0.0)] * 2 + [("1", 1.0)] * (PROMPTS - 2)
    assert "judges count" not in said
    assert len(built(path, [verdicts], judge_name=PERSON)[0]) == 2


def test_a_person_s_votes_may_be_named_for_pairs_that_ask_for_a_score(tmp_path):
    """They were taken out, though the advice where several judges count is to name one of them."""
    path = candidates(tmp_path / "c.jsonl", graded(PROMPTS))
    written(path, "small@00000001", lambda grade: -grade)
    verdicts = written(path, PERSON, lambda grade: grade)
    chosen, report, _ = built(path, [verdicts], judge_name=PERSON, reward_augmented=True)
    assert [*report.judges] == [PERSON]
    assert len(chosen) == 2 * PROMPTS
