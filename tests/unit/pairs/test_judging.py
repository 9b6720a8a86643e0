"""Judges with known faults: what they say, what is made of it, and what is printed of them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter

import pytest
from judges import candidates, endpoint, graded, grades, says

from fpo_mlx.cli.pairs import _show_judges
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs.labels import by_prompt, labels_of, resolve
from fpo_mlx.pairs.question import judge_name
from fpo_mlx.pairs.records import PERSON, Verdict, read_verdicts
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pairs.summary import cohen_kappa, self_agreement, summarise
from fpo_mlx.pipeline import pairs_build, pairs_check, pairs_judge


def judge(url, source, out, **words):
    said = []
    settings = JudgeConfig(judge_url=url, judge_model="stub", **words)
    report = pairs_judge(settings, candidates=source, output=out, say=said.append)
    return report, said


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_a_judge_that_leans_to_the_first_labels_nothing_wrong_and_its_lean_is_shown(tmp_path):
    """Issue 18, must show 2: in 70 % of its verdicts it names the first whatever is there."""
    chance = random.Random(1)
    truth = Counter()

    def biased(body):
        if chance.random() < 0.7:
            letter = "A"
        else:
            first, second = grades(body)
            letter = "A" if first > second else "B"
        truth[letter] += 1
        return says(letter)

    source = candidates(tmp_path / "c.jsonl", graded(400))
    with endpoint(biased) as (url, seen):
        report, _ = judge(url, source, tmp_path / "v.jsonl")
    (summary,) = report.judges.values()
    assert len(seen) == 800
    verdicts = list(read_verdicts(tmp_path / "v.jsonl").values())
    both = Counter()
    for v in verdicts:
        both[v.id, v.verdict] += 1
    flips = sum(count == 1 for count in both.values()) / 2 / 400
    assert summary.first_share == pytest.approx(truth["A"] / 800, abs=1e-9)
    assert summary.first_share == pytest.approx(0.85, abs=0.03)  # 0.7 + half of 0.3
    assert summary.flip_rate == pytest.approx(flips, abs=1e-9)
    # right in both orders: the worse one first must be seen through, 30 % of the time
    assert summary.flip_rate == pytest.approx(0.70, abs=0.03 + 2 * (0.21 / 400) ** 0.5)
    built = pairs_build(
        BuildConfig(valid_share=0.0, near_duplicates=1.0), candidates=source,
        verdicts=[tmp_path / "v.jsonl"], output=tmp_path / "pairs", say=lambda _: None,
    )  # fmt: skip
    text = (tmp_path / "pairs/train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == built.pairs > 80
    wrong = [r for r in rows if r["chosen"][0]["content"].endswith("0")]
    assert wrong == []  # it never names the worse one in both orders


def test_verdicts_on_answers_that_were_there_before_are_none_on_those_that_came_after(tmp_path):
    """The same prompts answered anew, judged into the same file: nothing old labels them."""

    def better(body):
        first, second = grades(body)
        return says("A" if first > second else "B")

    old = {f"Question {i}?": [f"old {i} of grade 1", f"old {i} of grade 0"] for i in range(6)}
    new = {f"Question {i}?": [f"new {i} of grade 0", f"new {i} of grade 1"] for i in range(6)}
    before = candidates(tmp_path / "before.jsonl", old)
    after = candidates(tmp_path / "after.jsonl", new)
    verdicts = tmp_path / "v.jsonl"
    with endpoint(better) as (url, _):
        assert judge(url, before, verdicts)[0].written == 12
        second, _ = judge(url, after, verdicts)
        assert (second.written, second.before) == (12, 12)
        assert judge(url, before, verdicts)[0].written == 0  # and those before count for it still
    (summary,) = second.judges.values()
    assert summary.verdicts == 12
    for source, grade in ((after, "new"), (before, "old")):
        settings = BuildConfig(valid_share=0.0, near_duplicates=1.0, force=True)
        built = pairs_build(
            settings, candidates=source, verdicts=[verdicts], output=tmp_path / grade,
            say=lambda _: None,
        )  # fmt: skip
        assert built.left["verdicts on answers that are not among the candidates"] == 12
        text = (tmp_path / grade / "train.jsonl").read_text()
        rows = [json.loads(row) for row in text.splitlines()]
        assert len(rows) == 6
        for row in rows:
            text = row["chosen"][0]["content"]
            assert text.startswith(grade)
            assert text.endswith("1")
    _, found = pairs_check(after, [verdicts])
    (other,) = [kind for kind in found.kinds if kind.kind == "other answers"]
    assert (other.level, other.count) == ("lost", 12)
    assert found.judges == second.judges


def test_verdicts_on_prompts_that_are_not_among_the_candidates_are_counted_each(tmp_path):
    """The prompts were counted, under the name of verdicts."""
    verdicts = tmp_path / "v.jsonl"
    given = {f"Q{n}?": ["short", "no short one", f"the longest one of {n}"] for n in range(5)}
    source = candidates(tmp_path / "c.jsonl", given)
    pairs_judge(JudgeConfig(reward="brevity"), candidates=source, output=verdicts, say=print)
    few = candidates(tmp_path / "few.jsonl", dict([*given.items()][:3]))
    built = pairs_build(
        BuildConfig(force=True), candidates=few, verdicts=[verdicts], output=tmp_path / "pairs",
        say=print,
    )  # fmt: skip
    assert built.left["verdicts on prompts that are not among the candidates"] == 2 * 3


def test_a_verdict_that_names_no_texts_is_taken_at_its_word(tmp_path):
    """Files of before, and of a user's own."""
    source = candidates(tmp_path / "c.jsonl", graded(3))
    verdicts = tmp_path / "v.jsonl"
    with endpoint(lambda body: says("A")) as (url, _):
        judge(url, source, verdicts)
        rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
        for row in rows:
            del row["texts"]
        verdicts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert judge(url, source, verdicts)[0].written == 0


def test_a_judge_that_always_names_the_second_is_warned_of(tmp_path, capsys):
    source = candidates(tmp_path / "c.jsonl", graded(3))
    with endpoint(lambda body: says("B")) as (url, _):
        report, _ = judge(url, source, tmp_path / "v.jsonl")
    _show_judges(report.judges)
    assert "leans to one position (0% for the first)" in capsys.readouterr().err


def test_judges_of_one_name_are_told_apart():
    """Folders of `fuse` and `convert` are all called alike, and hubs' models by their last name."""
    names = {
        judge_name(model, identity, criteria)
        for model, identity, criteria in (
            ("a/mlx_model", "1", "kind"),
            ("b/mlx_model", "2", "kind"),
            ("a/mlx_model", "1", "brief"),
        )
    }
    assert len(names) == 3
    assert all(name.startswith("mlx_model@") for name in names)


def test_a_judge_that_talks_nonsense_labels_nothing(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(40))
    replies = iter(["Both", "A and B", "", "a", "C", "Answer A is better", "0", "AB"] * 20)
    with endpoint(lambda body: says(next(replies))) as (url, _):
        report, _ = judge(url, source, tmp_path / "v.jsonl")
    (summary,) = report.judges.values()
    assert (summary.unreadable, summary.compared) == (80, 0)
    with pytest.raises(DataError, match="0 pairs"):
        pairs_build(
            BuildConfig(), candidates=source, verdicts=[tmp_path / "v.jsonl"],
            output=tmp_path / "pairs", say=lambda _: None,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["timeout", "memory_gb"])
@pytest.mark.parametrize("value", [float("inf"), 1e300, 0.0, -1.0])
def test_limits_that_no_system_can_be_told_are_refused(name, value):
    with pytest.raises(ConfigError, match="wanted more than 0, 1e"):
        JudgeConfig(reward="brevity", **{name: value})


def test_a_verdict_on_an_answer_that_is_not_there_is_counted_and_stops_nothing():
    (of_j,) = summarise(
        [said(0, 9, "none", "a"), said(0, 1, "none", "b")], lambda id: [3, 4]
    ).values()
    assert (of_j.verdicts, of_j.compared, of_j.longer_share) == (2, 1, 1.0)


# Labels -------------------------------------------------------------------------------------------


def said(a, b, order, verdict, judge="j", **more):
    return Verdict("id", a, b, order, verdict, judge, **more)


@pytest.mark.parametrize(
    ("ab", "ba", "want"),
    [("a", "a", "a"), ("b", "b", "b"), ("a", "b", "tie"), ("tie", "tie", "tie"),
     ("a", "tie", "tie"), ("a", "unreadable", None), ("unreadable", "unreadable", None),
     ("a", None, None)],
)  # fmt: skip
def test_both_orders_must_name_the_same_answer(ab, ba, want):
    verdicts = [said(0, 1, o, v) for o, v in (("ab", ab), ("ba", ba)) if v]
    label = resolve(verdicts)
    assert (label.verdict if label else None) == want


def test_the_label_is_the_same_whichever_way_round_the_line_is_written():
    one = labels_of([said(0, 1, "ab", "a", p=0.9), said(0, 1, "ba", "a", p=0.7)])
    turned = by_prompt([said(1, 0, "ba", "b", p=0.1), said(1, 0, "ab", "b", p=0.3)])["id"]
    (left,), (right,) = one, labels_of(turned)
    assert left.verdict == right.verdict == "a"
    assert left.agreement == pytest.approx(0.8)
    assert right.agreement == pytest.approx(0.8)


def test_scores_and_texts_turn_with_the_answers_that_they_are_of():
    more = {"p": 0.75, "score_a": 3.0, "score_b": 1.0, "texts": "x-y"}
    wanted = said(0, 1, "none", "a", **more)
    turned = {"p": 0.25, "score_a": 1.0, "score_b": 3.0, "texts": "y-x"}
    assert by_prompt([said(1, 0, "none", "b", **turned)]) == {"id": [wanted]}
    (label,) = labels_of([wanted])
    assert (label.score_a, label.score_b) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("side", "p", "agreement"),
    [("a", 0.53, 0.53), ("b", 0.2, 0.8), ("a", None, 1.0), ("tie", 0.5, 1.0), ("b", 0.6, 0.5)],
)
def test_a_judge_of_one_answer_at_a_time_is_as_sure_as_it_says(side, p, agreement):
    """A regression on features gives a probability, which counted as certain; a reward none."""
    (label,) = labels_of([said(0, 1, "none", side, p=p, score_a=1.0, score_b=1.0)])
    assert label.agreement == pytest.approx(agreement)


def test_a_person_has_the_last_word_and_the_majority_of_judges_before():
    three = [said(0, 1, "none", v, judge=f"r{n}") for n, v in enumerate(("a", "a", "b"))]
    (label,) = labels_of(three)
    assert label.verdict == "a"
    assert label.agreement == pytest.approx(2 / 3)
    assert not label.person
    (label,) = labels_of([*three, said(0, 1, "ba", "b", judge=PERSON)])
    assert (label.verdict, label.person) == ("b", True)
    (label,) = labels_of(three[1:])
    assert label.verdict == "tie"


@pytest.mark.parametrize("vote", ["a", "b", "tie", "both_bad"])
def test_a_persons_vote_keeps_the_scores_that_the_judges_gave(vote):
    """Where a person had voted on all of a prompt's answers, their scores were shares of wins."""
    judged = said(0, 1, "none", "a", score_a=7.0, score_b=3.0)
    silent = said(0, 1, "none", "b", judge="silent")
    (label,) = labels_of([silent, judged, said(0, 1, "ab", vote, judge=PERSON)])
    assert (label.verdict, label.agreement, label.person) == (vote, 1.0, True)
    assert (label.score_a, label.score_b) == (7.0, 3.0)
    (label,) = labels_of([silent, said(0, 1, "ab", vote, judge=PERSON)])
    assert (label.score_a, label.score_b) == (None, None)


@pytest.mark.parametrize("again", ["a", "both_bad", "skip"])
def test_a_persons_own_text_stands_whatever_they_say_of_the_two_when_they_come_again(again):
    edited = said(0, 1, "ab", "both_bad", judge=PERSON, edited="mine", time=1.0)
    votes = [edited, said(0, 1, "ba", again, judge=PERSON, time=2.0)]
    assert [(label.edited, label.person) for label in labels_of(votes)] == [("mine", True)]
    (of_them,) = summarise(votes, lambda id: [3, 4]).values()
    assert of_them.flip_rate is None  # one says nothing of the two, so they did not turn round


def test_a_persons_agreement_with_themselves_is_counted_over_what_they_were_asked_twice():
    """Two pairs said the same of, one not; one skipped the second time, one asked once."""
    words = [("a", "a"), ("b", "a"), ("tie", "tie"), ("a", "skip")]
    votes = [
        said(0, n, order, word, judge=PERSON)
        for n, both in enumerate(words, start=1)
        for order, word in zip(("ab", "ba"), both, strict=True)
    ]
    votes += [said(1, 2, "ab", "a", judge=PERSON), said(1, 3, "ab", "a"), said(1, 3, "ba", "b")]
    assert self_agreement(votes) == (2, 3)


def test_cohens_kappa_by_hand():
    table = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    assert cohen_kappa(table) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")]) is None


# Rewards ------------------------------------------------------------------------------------------


def test_the_examples_prefer_what_they_say():
    from fpo_mlx.pairs.example_rewards import brevity, plainness

    assert brevity("", "Yes.") > brevity("", "Yes, and " * 30) > brevity("", "")
    heavy = "Extraordinary circumstances, notwithstanding, led to delays."
    assert plainness("", "It is so. We saw it.") > plainness("", heavy)
    assert plainness("", "") == -20.0
