"""Which pairs are built of labelled candidates, and what is written of them."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import lines, refused, run
from judges import candidates, graded

from fpo_mlx.data import read_split
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs.augment import score_turns
from fpo_mlx.pairs.choose import Left, asks_alike, augmented, balanced, pairs_of
from fpo_mlx.pairs.labels import Label
from fpo_mlx.pairs.records import (
    Candidate,
    Candidates,
    Prompt,
    open_candidates,
    parse_prompt,
)
from fpo_mlx.pairs.settings import BuildConfig


def found(*texts, finish="stop", model="m"):
    answers = tuple(Candidate(t, len(t.split()), finish, model=model) for t in texts)
    return Candidates("id", Prompt(({"role": "user", "content": "Why?"},)), answers)


def by_score(*scores):
    """Labels of a reward, for every two candidates."""
    return [
        Label(a, b, "tie" if x == y else "a" if x > y else "b", 1.0, x, y)
        for a, x in enumerate(scores)
        for b, y in enumerate(scores)
        if a < b
    ]


USER, HERS = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("answer", "said"),
    [("So.", "So."), ([HERS], "So."), (HERS, "So."), ([USER, HERS], "So."),
     ([{"from": "gpt", "value": "So."}], "So."), (json.dumps([HERS]), "So."),
     ([{**USER, "content": "Who?"}, HERS], None), ([HERS, HERS], None), ([USER], None),
     ([{"role": "assistant", "content": " "}], None), ([], None), (3, None), ([3], None)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["answer", "chosen"])
def test_a_person_s_answer_is_read_as_rows_of_data_write_it(name, answer, said):
    """As messages, which is how `pairs build` writes it, it was left out without a word."""
    assert parse_prompt({"prompt": [USER], name: answer}, "p.jsonl:1").answer == said


def chosen(candidates, labels, **settings):
    left = Left()
    pairs = pairs_of(candidates, labels, BuildConfig(**settings), left)
    return [(p.chosen, p.rejected) for p in pairs], dict(left.counts)


def test_the_best_is_set_against_the_worst():
    pairs, left = chosen(found("one", "two", "three", "four"), by_score(0.2, 0.9, 0.1, 0.5))
    assert pairs == [("two", "three")]
    assert left == {"more pairs than asked for per prompt": 5}


def test_all_pairs_above_a_margin_or_the_widest_few():
    four, labels = found("one", "two", "three", "four"), by_score(0.2, 0.9, 0.1, 0.5)
    assert chosen(four, labels, margin=0.39)[0] == [
        ("two", "three"), ("two", "one"), ("two", "four"), ("four", "three"),
    ]  # fmt: skip
    assert len(chosen(four, labels, per_prompt=2)[0]) == 2
    assert len(chosen(four, labels, margin=0.39, per_prompt=3)[0]) == 3


def test_ties_both_bad_and_answers_cut_by_length_make_no_pair():
    two = found("one", "two")
    for verdict, reason in (("tie", "tie"), ("both_bad", "both bad")):
        assert chosen(two, [Label(0, 1, verdict)]) == ([], {reason: 1})
    cut = found("one", "two", finish="length")
    assert chosen(cut, [Label(0, 1, "a")]) == ([], {"an answer cut by length": 1})
    assert chosen(cut, [Label(0, 1, "a")], keep_cut=True)[0] == [("one", "two")]


def test_without_scores_an_answer_is_worth_its_share_of_wins():
    labels = [Label(0, 1, "a", 0.9), Label(0, 2, "a", 0.8), Label(1, 2, "b", 0.6)]
    (pair,) = pairs_of(found("one", "two", "three"), labels, BuildConfig(), Left())
    assert (pair.chosen, pair.rejected) == ("one", "two")
    assert pair.score_chosen == pytest.approx(0.85)
    assert pair.score_rejected == pytest.approx((0.1 + 0.4) / 2)
    assert pair.agreement == 0.9


def test_a_persons_own_text_beats_both_answers():
    pairs, _ = chosen(found("one", "two"), [Label(0, 1, "both_bad", edited="mine")], per_prompt=2)
    assert sorted(pairs) == [("mine", "one"), ("mine", "two")]


@pytest.mark.parametrize("settings", [{}, {"margin": 3.0}, {"margin": 3.0, "per_prompt": 1}])
def test_a_persons_vote_comes_before_a_wider_gap_of_a_judge(settings):
    """The two that the vote is on have their scores from the judge's other comparisons."""
    labels = [Label(0, 1, "b", person=True), *by_score(20.0, 5.0, 9.0)[1:]]
    pairs, left = chosen(found("one", "two", "three"), labels, **settings)
    assert pairs[0] == ("two", "one")
    assert "below --margin" not in left


def test_a_persons_own_text_comes_first_on_any_scale_of_scores():
    own = Label(0, 1, "both_bad", edited="mine", person=True)
    pairs, _ = chosen(found("one", "two", "three"), [own, *by_score(20.0, 5.0, 9.0)[1:]])
    assert [winner for winner, _ in pairs] == ["mine"]
    pairs, _ = chosen(
        found("one", "two", "three"), [own, *by_score(20.0, 5.0, 9.0)[1:]], margin=2.0
    )
    assert [winner for winner, _ in pairs][:2] == ["mine", "mine"]


def test_a_persons_answer_is_used_against_the_reference_only():
    answers = (*found("one", "two").candidates, Candidate("hers", 1, "stop", model="human"))
    three = Candidates("id", found("x").prompt, answers)
    labels = [Label(0, 1, "a"), Label(0, 2, "b"), Label(1, 2, "a")]
    assert chosen(three, labels, per_prompt=9)[0] == [("one", "two")]
    both = chosen(three, labels, per_prompt=9, against_reference=True)[0]
    assert sorted(both) == [("hers", "one"), ("two", "hers")]  # whoever is better is chosen


def test_lengths_are_evened_out():
    pairs = [
        pairs_of(found("a b c d", f"e{n}"), [Label(0, 1, "a" if n < 8 else "b")], BuildConfig(),
                 Left())[0]
        for n in range(10)
    ]  # fmt: skip
    even = balanced(pairs, 0, left := Left())
    assert len(even) == 4
    assert sum(p.tokens[0] > p.tokens[1] for p in even) == 2
    assert left.counts["to even the lengths"] == 6


def test_the_turned_row_says_of_its_own_answers_where_they_came_from():
    (pair,) = pairs_of(found("one", "two"), by_score(0.2, 0.9), BuildConfig(), Left())
    pair = dataclasses.replace(pair, source={**pair.source, "models": ["m2", "m1"]})
    straight, turned = (row.source for row in augmented(pair))
    assert (straight["chosen"], straight["rejected"], straight["models"]) == (1, 0, ["m2", "m1"])
    assert (turned["chosen"], turned["rejected"], turned["models"]) == (0, 1, ["m1", "m2"])
    assert turned["scores"] == straight["scores"][::-1] == [0.2, 0.9]


@pytest.mark.parametrize(("scores", "alike"), [((87.6, 88.4), True), ((87.6, 89.4), False)])
def test_rows_that_would_ask_for_the_same_score_are_known(scores, alike):
    (pair,) = pairs_of(found("one", "two"), by_score(*scores), BuildConfig(), Left())
    assert asks_alike(pair) is alike


def test_the_wanted_score_stands_at_the_end_of_the_system_text():
    user = ({"role": "user", "content": "Q"},)
    assert score_turns(user, 0.51234)[0] == {
        "role": "system", "content": "Write an answer whose score is 0.51."
    }  # fmt: skip
    own = ({"role": "system", "content": "Be kind."}, *user)
    assert score_turns(own, 2.0)[0]["content"] == "Be kind.\n\nWrite an answer whose score is 2."
    assert score_turns(own, 2.0)[1:] == user
    assert score_turns(score_turns(own, 2.0), 0.9) == score_turns(own, 0.9), "asked for once"
    assert score_turns(score_turns(user, 2.0), 0.9) == score_turns(user, 0.9)
    scores = {-0.5719: "-0.57", -0.0: "0", -0.001: "-0.001", 87.5: "88", 1234.0: "1200"}
    for score, words in scores.items():
        assert score_turns(user, score)[0]["content"].endswith(f" is {words}.")


# The command --------------------------------------------------------------------------------------


def source(tmp_path, count=60, n=3):
    path = candidates(tmp_path / "c.jsonl", graded(count, n))
    reward = tmp_path / "grade.py"
    reward.write_text("def grade(prompt, answer):\n    return int(answer.split()[-1])\n")
    return path, f"{reward}:grade"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_candidates_to_files_that_train_reads(tmp_path):
    path, reward = source(tmp_path)
    out = tmp_path / "pairs"
    done = run("pairs", "build", path, "--reward", reward, "--near-duplicates", 1, "--output", out)
    assert done.exit_code == 0, done.stderr
    assert "60 pairs (54 train, 6 valid rows)" in done.stdout
    assert len(read_split(out, "train")) == 54
    assert len(read_split(out, "valid")) == 6
    for row in rows(out / "train.jsonl"):
        assert row["chosen"][0]["content"].endswith("grade 2")
        assert row["rejected"][0]["content"].endswith("grade 0")
        assert (row["score_chosen"], row["score_rejected"], row["agreement"]) == (2, 0, 1)
        assert row["from"]["models"] == ["m", "m"]
    ids = [{row["id"] for row in rows(out / f"{name}.jsonl")} for name in ("train", "valid")]
    assert not ids[0] & ids[1]
    about = json.loads((out / "pairs.json").read_text())
    assert about["pairs"] == 60
    assert about["tokens_chosen"] == about["tokens_rejected"] > 0
    (of_judge,) = about["judges"].values()
    assert of_judge["compared"] == 180  # three answers, each against each
    again = run("pairs", "build", path, "--reward", reward, "--output", out)
    refused(again, 2, "--overwrite replaces")


def test_reward_augmented_rows_ask_for_the_score_of_the_chosen_answer(tmp_path):
    path, reward = source(tmp_path)
    words = ["--reward", reward, "--near-duplicates", 1, "--reward-augmented", "--valid-share", 0]
    done = run("pairs", "build", path, *words, "--output", tmp_path / "pairs")
    assert done.exit_code == 0, done.stderr
    made = rows(tmp_path / "pairs/train.jsonl")
    assert len(made) == 120
    for row in made:
        wanted = row["prompt"][0]["content"].removesuffix(".").split()[-1]
        assert row["chosen"][0]["content"].split()[-1] == wanted
        own, other = row["from"]["scores"]
        assert row["from"]["wanted"] == own == float(wanted)
        assert (row["score_chosen"], row["score_rejected"]) == (0.0, -abs(own - other))
        assert own != other
    assert "scores disagree" not in done.stderr
    assert [row["prompt"][0]["content"][-2] for row in made].count("2") == 60


def test_reward_augmented_rows_of_scores_that_read_alike_are_left_out_and_said(tmp_path):
    path, _ = source(tmp_path)
    near = "def near(prompt, answer):\n    return 87 + int(answer.split()[-1]) / 1e4\n"
    (tmp_path / "near.py").write_text(near)
    words = ["--reward", f"{tmp_path / 'near.py'}:near", "--reward-augmented"]
    done = run("pairs", "build", path, *words, "--output", tmp_path / "pairs")
    refused(done, 3, "0 pairs from", "scores alike in two digits")


def test_a_wanted_score_is_of_one_judge(tmp_path):
    path, reward = source(tmp_path)
    words = ["--near-duplicates", 1, "--valid-share", 0]
    scored = ["--reward", reward, *words, "--output", tmp_path / "scored"]
    assert run("pairs", "build", path, *scored).exit_code == 0
    verdicts = tmp_path / "c-rewards.jsonl"
    one = json.loads(verdicts.read_text().splitlines()[0])
    vote = one | {"judge": "person", "verdict": "a", "score_a": None, "score_b": None}
    votes = lines(tmp_path / "votes.jsonl", vote)
    both = ["--verdicts", verdicts, "--verdicts", votes, *words, "--reward-augmented"]
    done = run("pairs", "build", path, *both, "--output", tmp_path / "mixed")
    refused(done, 2, "scales of their own", "person", "--judge-name")
    named = run(
        "pairs", "build", path, *both, "--judge-name", one["judge"], "--output", tmp_path / "named"
    )
    assert named.exit_code == 0, named.stderr
    assert len(rows(tmp_path / "named/train.jsonl")) == 120


def test_a_build_of_no_pairs_is_refused_whatever_force_says(tmp_path):
    """It was a folder without rows, and exit code 0."""
    path, _ = source(tmp_path)
    (tmp_path / "same.py").write_text("def same(prompt, answer):\n    return 1.0\n")
    words = ["--reward", f"{tmp_path / 'same.py'}:same", "--force"]
    done = run("pairs", "build", path, *words, "--output", tmp_path / "none")
    refused(done, 3, "0 pairs from 60 prompts", "judge more of them.")
    assert not (tmp_path / "none").exists()


def test_no_judging_is_asked_for_prompts_with_one_answer(tmp_path):
    path, reward = source(tmp_path, n=1)
    done = run("pairs", "build", path, "--reward", reward, "--output", tmp_path / "pairs")
    refused(done, 3, "60 × a prompt with one answer", "answer each prompt several times")
    assert "judge more" not in done.stderr


def test_rows_that_are_no_verdicts_are_called_so(tmp_path):
    path, _ = source(tmp_path)
    done = run("pairs", "build", path, "--verdicts", path, "--output", tmp_path / "pairs")
    refused(done, 3, "c.jsonl:1: no verdict", "id, prompt, candidates", "a file of verdicts")


def test_rows_in_a_file_that_is_called_like_a_builds_record_are_data(tmp_path):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs.json").write_text(json.dumps([row] * 3))
    assert len(list(read_split(tmp_path, "train"))) == 3


def test_a_second_reward_is_not_read_from_what_the_first_one_left(tmp_path):
    path, reward = source(tmp_path)
    worst = "def worst(prompt, answer):\n    return -100 * int(answer.split()[-1])\n"
    (tmp_path / "worst.py").write_text(worst)
    found = []
    for number, one in enumerate((reward, f"{tmp_path / 'worst.py'}:worst", reward)):
        out = tmp_path / f"pairs-{number}"
        words = ["--reward", one, "--near-duplicates", 1, "--valid-share", 0, "--output", out]
        done = run("pairs", "build", path, *words)
        assert done.exit_code == 0, done.stderr
        found.append(rows(out / "train.jsonl"))
    first, second, third = ([(r["chosen"], r["score_chosen"]) for r in made] for made in found)
    assert {score for _, score in first} == {2.0}
    assert {score for _, score in second} == {0.0}
    assert first == third


def test_the_users_folder_is_spelled_out_in_a_reward(tmp_path, monkeypatch):
    """As `pairs judge` does it: a shell leaves the ~ of --reward=~/f.py:f alone."""
    path, _ = source(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run("pairs", "build", path, "--reward=~/grade.py:grade", "--output", tmp_path / "pairs")
    assert done.exit_code == 0, done.stderr


def test_too_few_pairs_are_refused_with_the_reasons_and_written_by_force(tmp_path):
    path, reward = source(tmp_path, 5)
    words = ["pairs", "build", path, "--reward", reward, "--output", tmp_path / "pairs"]
    refused(run(*words), 3, "5 pairs from 5 prompts are too few", "--force")
    assert not (tmp_path / "pairs").exists()
    done = run(*words, "--force")
    assert done.exit_code == 0, done.stderr
    assert "--model" not in done.stderr  # it has no such flag


def test_a_judge_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path, reward = source(tmp_path)
    verdicts = tmp_path / "v.jsonl"
    run("pairs", "judge", path, "--reward", reward, "--output", verdicts)
    words = ["--verdicts", verdicts, "--output", tmp_path / "pairs"]
    refused(run("pairs", "build", path, *words, "--judge-name", "x"), 2, "reward:grade@")
    refused(run("pairs", "build", path, "--output", tmp_path / "pairs"), 2, "--verdicts is missing")


@pytest.mark.parametrize(
    "text", ["\n\nHuman: a\n\nAssistant: b", "<script>alert(1)</script>", "a\x00b", "\u202eabc",
             "{% raw %}{{ x }}", "<|im_end|>"],
)  # fmt: skip
def test_an_answer_stays_what_it_is_whatever_it_looks_like(tmp_path, text):
    path = candidates(tmp_path / "c.jsonl", {f"Q{n}?": [f"{text} {n} 1", f"no {n} 0"]
                                             for n in range(3)})  # fmt: skip
    grade = tmp_path / "grade.py"
    grade.write_text("def grade(prompt, answer):\n    return int(answer.split()[-1])\n")
    reward = f"{grade}:grade"
    words = ["--reward", reward, "--force", "--valid-share", 0, "--output", tmp_path / "pairs"]
    done = run("pairs", "build", path, *words)
    assert done.exit_code == 0, done.stderr
    for n, row in enumerate(read_split(tmp_path / "pairs", "train")):
        assert row.chosen == ({"role": "assistant", "content": f"{text} {n} 1"},)
        assert row.prompt == ({"role": "user", "content": f"Q{n}?"},)


@pytest.mark.parametrize("id", ["../../etc/passwd", "/abs", "a/b\x00", "..", "CON"])
def test_an_id_is_never_a_path(tmp_path, id):
    path = candidates(tmp_path / "c.jsonl", {id: ["a 1", "b 0"]})
    assert next(iter(open_candidates(path))).id == id
    before = sorted(p.name for p in tmp_path.iterdir())
    from fpo_mlx.pairs.rating import Rating

    rating = Rating(path, tmp_path / "v.jsonl")
    rating.vote(rating.next()["name"], "first")
    rating.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "v.jsonl"])


@pytest.mark.parametrize(
    ("row", "part"),
    [({"id": 3}, "id is a number"), ({"candidates": []}, "no list"), ({"prompt": ""}, "prompt"),
     ({"id": "x" * 201}, "201"), ({"candidates": [{"text": 1, "finish": "stop"}]}, "text"),
     ({"candidates": [{"text": "a", "finish": "odd"}]}, "finish")],
)  # fmt: skip
def test_a_line_that_is_none_is_named(tmp_path, row, part):
    good = {"id": "1", "prompt": "Q", "candidates": [{"text": "a", "tokens": 1, "finish": "stop"}]}
    path = lines(tmp_path / "c.jsonl", good, good | row)
    with pytest.raises(DataError, match=r"c\.jsonl:2") as error:
        open_candidates(path)
    assert part in str(error.value)


def test_pairs_in_place_of_candidates_are_named_as_another_file(tmp_path):
    rows = lines(tmp_path / "train.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"})
    words = ("pairs", "judge", rows, "--reward", "brevity", "--output", tmp_path / "v.jsonl")
    refused(run(*words), 3, "train.jsonl:1: no 'id' in it", "`fpo-mlx pairs` wrote")


def test_the_settings_refuse_what_cannot_be():
    for words in ({"margin": -1}, {"per_prompt": 0}, {"near_duplicates": 0}, {"valid_share": 1}):
        with pytest.raises(ConfigError):
            BuildConfig(**words)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_sixty_thousand_candidates_start_within_five_seconds_and_are_not_in_memory(tmp_path):
    """Issue 18, must show 7: 15,000 prompts of 4 answers of 1,200 letters, 75 MB."""
    chance = random.Random(0)
    words = [f"word{n}" for n in range(500)]
    texts = [" ".join(chance.choices(words, k=180)) for _ in range(400)]
    with open(tmp_path / "c.jsonl", "w") as out:
        for n in range(15_000):
            answers = [
                {"text": text, "tokens": 180, "finish": "stop"} for text in chance.sample(texts, 4)
            ]
            row = {"id": f"{n:016x}", "prompt": f"Question {n}?", "candidates": answers}
            out.write(json.dumps(row) + "\n")
    size = (tmp_path / "c.jsonl").stat().st_size
    assert size > 70e6
    probe = (
        "import re, time\n"
        "from pathlib import Path\n"
        "from fpo_mlx.pairs.rating import Rating\n"
        "status = Path('/proc/self/status')\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "before = peak()\n"
        "begun = time.process_time()\n"
        f"rating = Rating(Path({str(tmp_path / 'c.jsonl')!r}), Path({str(tmp_path / 'v')!r}))\n"
        "assert rating.next()['total'] > 15000\n"
        "print(time.process_time() - begun, (peak() - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 5, f"{seconds} s"
    assert megabytes < 40, f"{megabytes} MB of {size / 1e6} on disk"
