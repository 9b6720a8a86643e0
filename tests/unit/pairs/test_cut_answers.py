"""Answers that ended by length: `pairs build` leaves them out, so nobody is asked about them."""

from __future__ import annotations

import importlib
import json

import pytest
from command_line import refused, run
from judges import candidates, endpoint, grades, says

from fpo_mlx.errors import DataError
from fpo_mlx.pairs.choose import Left, pairs_of
from fpo_mlx.pairs.labels import Label
from fpo_mlx.pairs.rating import Rating, queue
from fpo_mlx.pairs.records import open_candidates, read_verdicts
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pipeline import pairs_judge


def with_cut(path, *cut, count=4, n=3):
    """Prompts of n answers, of which those with these numbers ended by length."""
    texts = {f"Question {i}?": [f"answer {i} of grade {g}" for g in range(n)] for i in range(count)}
    rows = [json.loads(line) for line in candidates(path, texts).read_text().splitlines()]
    for row in rows:
        for number in cut:
            row["candidates"][number]["finish"] = "length"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def better(body):
    first, second = grades(body)
    return says("A" if first > second else "B")


def test_a_person_is_not_shown_answers_that_make_no_pair(tmp_path):
    """Two votes in three went to comparisons that `pairs build` left out."""
    found = open_candidates(with_cut(tmp_path / "c.jsonl", 1))
    assert {(one.a, one.b) for one in queue(found, 9, 0)} == {(0, 2)}
    shown = {(one.a, one.b) for one in queue(found, 9, 0, keep_cut=True)}
    assert shown == {(0, 1), (0, 2), (1, 2)}


def test_a_file_of_cut_answers_to_rate_is_told_how_to_have_whole_ones(tmp_path):
    path, out = with_cut(tmp_path / "c.jsonl", 0, 1), tmp_path / "v.jsonl"
    with pytest.raises(DataError, match="cut at --max-tokens") as error:
        Rating(path, out)
    assert "--keep-cut" in str(error.value)
    assert not out.exists()
    rating = Rating(path, out, keep_cut=True)
    assert rating.next()["total"] >= 4
    rating.close()


def test_cut_answers_are_rated_where_they_are_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("fpo_mlx.pairs.web.serve.serve", lambda *_, **__: None)
    words = ["pairs", "rate", with_cut(tmp_path / "c.jsonl", 0, 1), "--no-browser"]
    words += ["--output", tmp_path / "v.jsonl"]
    refused(run(*words), 3, "--keep-cut")
    done = run(*words, "--keep-cut")
    assert done.exit_code == 0, done.stderr
    assert "0 votes" in done.stdout


def test_no_judge_is_asked_about_answers_that_make_no_pair(tmp_path):
    path, said = with_cut(tmp_path / "c.jsonl", 1), []
    words = {"candidates": path, "output": tmp_path / "v.jsonl", "say": said.append}
    with endpoint(better) as (url, seen):
        judge = {"judge_url": url, "judge_model": "stub"}
        assert pairs_judge(JudgeConfig(**judge), **words).written == 8
        assert len(seen) == 8
        assert any("4 answers were cut" in one and "--keep-cut" in one for one in said)
        assert pairs_judge(JudgeConfig(**judge, keep_cut=True), **words).written == 16
    assert {(v.a, v.b) for v in read_verdicts(tmp_path / "v.jsonl").values()} == {
        (0, 1), (0, 2), (1, 2),
    }  # fmt: skip


def test_neighbours_are_those_among_the_whole_answers(tmp_path):
    path, out = with_cut(tmp_path / "c.jsonl", 1, 3, n=5), tmp_path / "v.jsonl"
    with endpoint(better) as (url, _):
        judge = JudgeConfig(judge_url=url, judge_model="stub", compare="neighbours")
        pairs_judge(judge, candidates=path, output=out, say=print)
    assert {(v.a, v.b) for v in read_verdicts(out).values()} == {(0, 2), (2, 4), (0, 4)}


def test_a_reward_scores_cut_answers_too(tmp_path):
    """It costs nothing, and `pairs build --keep-cut` may come after it."""
    path, said = with_cut(tmp_path / "c.jsonl", 1), []
    out = tmp_path / "v.jsonl"
    report = pairs_judge(
        JudgeConfig(reward="brevity"), candidates=path, output=out, say=said.append
    )
    assert report.written == 12
    assert said == []


def test_a_person_s_own_text_stands_beside_a_cut_answer_that_it_beats(tmp_path):
    """It was lost with it, though it is whole; what is chosen has an end."""
    one = next(iter(open_candidates(with_cut(tmp_path / "c.jsonl", 1, n=2))))
    left = Left()
    own = Label(0, 1, "both_bad", edited="mine", person=True)
    pairs = pairs_of(one, [own], BuildConfig(per_prompt=2), left)
    assert sorted((p.chosen, p.rejected) for p in pairs) == [
        ("mine", "answer 0 of grade 0"), ("mine", "answer 0 of grade 1"),
    ]  # fmt: skip
    assert not left.counts
    assert pairs_of(one, [Label(0, 1, "a", person=True)], BuildConfig(), left) == []


def test_no_cut_answer_beside_a_person_s_own_text_is_asked_for_by_its_score(tmp_path):
    """The turned row trained it as the chosen one."""
    one = next(iter(open_candidates(with_cut(tmp_path / "c.jsonl", 1, n=2))))
    own = Label(0, 1, "both_bad", edited="mine", person=True)
    for keep_cut, rejected in (
        (False, ["answer 0 of grade 0"]),
        (True, ["answer 0 of grade 0", "answer 0 of grade 1"]),
    ):
        settings = BuildConfig(per_prompt=2, reward_augmented=True, keep_cut=keep_cut)
        assert sorted(p.rejected for p in pairs_of(one, [own], settings, Left())) == rejected


def test_prompts_whose_answers_were_cut_are_told_what_helps_them(tmp_path):
    """They were "without verdicts", to be judged; no judge is asked about them."""
    path, out = with_cut(tmp_path / "c.jsonl", 0, 1), tmp_path / "v.jsonl"
    with endpoint(better) as (url, seen):
        judge = JudgeConfig(judge_url=url, judge_model="stub")
        pairs_judge(judge, candidates=path, output=out, say=print)
        assert not seen
    words = ["pairs", "build", path, "--verdicts", out, "--output", tmp_path / "pairs"]
    done = run(*words)
    refused(done, 3, "4 × a prompt without verdicts, with fewer than two answers that were not cut")
    refused(done, 3, "larger `--max-tokens`", "`--keep-cut` of both", "build: {keep_cut: true}")
    assert "judge more" not in done.stderr


def test_cut_answers_that_a_reward_judged_are_told_what_helps_them(tmp_path):
    path, reward = with_cut(tmp_path / "c.jsonl", 0, 1), tmp_path / "my.py"
    reward.write_text("def grade(prompt, answer):\n    return int(answer[-1])\n")
    words = ["pairs", "build", path, "--reward", f"{reward}:grade", "--output", tmp_path / "pairs"]
    done = run(*words)
    refused(done, 3, "an answer cut by length", "larger `--max-tokens`", "--keep-cut")
    assert "judge more" not in done.stderr


def test_the_line_on_cut_answers_says_what_a_file_of_rounds_takes(tmp_path):
    path, said = with_cut(tmp_path / "c.jsonl", 1), []
    with endpoint(better) as (url, _):
        judge = JudgeConfig(judge_url=url, judge_model="stub")
        pairs_judge(judge, candidates=path, output=tmp_path / "v.jsonl", say=said.append)
    assert "`build: {keep_cut: true}`" in said[-1]


def test_rounds_compare_held_out_answers_that_were_cut(tmp_path):
    """All of them ended in a tie of answers that nobody was asked about."""
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    texts = {f"Q{i}?": [f"of grade {i % 2}"] for i in range(6)}
    before = candidates(tmp_path / "b.jsonl", texts, finish="length")
    texts = {f"Q{i}?": ["of grade 2"] for i in range(6)}
    after = candidates(tmp_path / "a.jsonl", texts, finish="length")
    with endpoint(better) as (url, _):
        judge = JudgeConfig(judge_url=url, judge_model="stub")
        assert rounds._against(before, after, judge, tmp_path, print)[0] == 1.0
