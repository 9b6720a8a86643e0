"""Judges with known faults: what they say, what is made of it, and what is printed of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from judges import candidates, endpoint, graded, grades, says

from fpo_mlx.cli.pairs import _show_judges
from fpo_mlx.errors import ConfigError, DataError, FpoError
from fpo_mlx.pairs.labels import labels_of, resolve
from fpo_mlx.pairs.question import judge_name, read_reply
from fpo_mlx.pairs.records import PERSON, Verdict, read_verdicts
from fpo_mlx.pairs.settings import BuildConfig, JudgeConfig
from fpo_mlx.pairs.summary import cohen_kappa, summarise
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


FAULTS = {
    "429": 429, "500": 500, "503": 503, "broken JSON": b'{"choices": [', "no choices": b"{}",
    "a list": b"[]", "closed": None, "not UTF-8": b"\xff\xfe", "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_second_reply_a_fault_loses_and_doubles_no_verdict(tmp_path, fault):
    calls = []

    def shaky(body):
        calls.append(1)
        return fault if len(calls) % 2 else says("A" if grades(body)[0] else "B")

    source = candidates(tmp_path / "c.jsonl", graded(6))
    with endpoint(shaky) as (url, _):
        report, _ = judge(url, source, tmp_path / "v.jsonl")
    lines = (tmp_path / "v.jsonl").read_text().splitlines()
    assert (
        len(lines) == len({tuple(json.loads(x)[k] for k in ("id", "order")) for x in lines}) == 12
    )
    assert report.written == 12
    assert next(iter(report.judges.values())).flip_rate == 0


def test_a_silent_endpoint_ends_the_run_and_the_next_goes_on(tmp_path):
    alive, calls = [False], []

    def reply(body):
        calls.append(body)
        if not alive[0] and len(calls) > 5:
            return 500
        return says("A" if grades(body)[0] else "B")

    source = candidates(tmp_path / "c.jsonl", graded(6))
    with endpoint(reply) as (url, _):
        with pytest.raises(FpoError, match="no answer after 3 tries, the last: HTTP 500"):
            judge(url, source, tmp_path / "v.jsonl", retries=2)
        kept = (tmp_path / "v.jsonl").read_bytes()
        assert len(kept.splitlines()) == 5
        alive[0] = True
        report, _ = judge(url, source, tmp_path / "v.jsonl", retries=2)
        after = (tmp_path / "v.jsonl").read_bytes()
        assert after.startswith(kept)
        assert len(after.splitlines()) == 12
        assert (report.written, report.before) == (7, 5)
        (tmp_path / "v.jsonl").unlink()  # requests are kept by their content
        asked = len(calls)
        judge(url, source, tmp_path / "v.jsonl")
        assert len(calls) == asked


def test_a_reply_that_takes_too_long_is_given_up(tmp_path):
    stop = threading.Event()
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with endpoint(lambda body: stop.wait(5) and None) as (url, _):
        with pytest.raises(FpoError, match="timed out"):
            judge(url, source, tmp_path / "v.jsonl", retries=1, timeout=0.2)
        stop.set()


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    source = candidates(tmp_path / "c.jsonl", graded(2))
    with endpoint(lambda body: says("A")) as (url, seen):
        _, said = judge(url, source, tmp_path / "v.jsonl", key_variable="MY_KEY")
    assert {s["headers"]["Authorization"] for s in seen} == {"Bearer sk-very-secret"}
    assert "127.0.0.1" in said[0]
    assert "MY_KEY" in said[0]
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()
    assert not any("secret" in line for line in said)


@pytest.mark.parametrize(
    ("code", "part"), [(401, "environment variable"), (404, "address"), (302, "302")]
)
def test_a_refusal_or_a_redirect_is_said_at_once(tmp_path, code, part):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    with endpoint(lambda body: code) as (url, seen), pytest.raises(ConfigError, match=part):
        judge(url, source, tmp_path / "v.jsonl")
    assert len(seen) == 1


def test_log_probs_are_read_where_offered_and_done_without_where_refused(tmp_path):
    top = [{"token": " A", "logprob": -0.2231435513}, {"token": "B", "logprob": -1.6094379124}]
    with_p = says("B") | {}
    with_p["choices"][0]["logprobs"] = {"content": [{"top_logprobs": top}]}
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with endpoint(lambda body: with_p) as (url, _):
        judge(url, source, tmp_path / "v.jsonl")
    found = {v.order: v for v in read_verdicts(tmp_path / "v.jsonl").values()}
    assert found["ab"].p == pytest.approx(0.8)  # 0.8 against 0.2
    assert found["ba"].p == pytest.approx(0.2)
    with endpoint(lambda body: 400 if "logprobs" in body else says("A")) as (url, seen):
        judge(url, source, tmp_path / "w.jsonl")
    assert ["logprobs" in body for body in seen] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "token", "first"),
    [("**A**", "**", 1.0), ("\nB", "\n", 0.0), ('"A"', '"', 1.0), ("Both", "Both", None)],
)  # fmt: skip
def test_a_letter_that_is_not_the_first_token_is_read_from_the_text(text, token, first):
    top = [{"token": token, "logprob": -0.01}, {"token": "B", "logprob": -5.0}]
    reply = says(text)
    reply["choices"][0]["logprobs"] = {"content": [{"top_logprobs": top}]}
    found, raw = read_reply(reply)
    assert found == first
    assert json.loads(raw) == {"text": text, "p": [0.0, pytest.approx(0.0067, abs=1e-4)]}


def test_finding_out_that_log_probs_are_refused_takes_none_of_the_tries(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with endpoint(lambda body: 422 if "logprobs" in body else says("A")) as (url, seen):
        judge(url, source, tmp_path / "v.jsonl", retries=0)
    assert ["logprobs" in body for body in seen] == [True, False, False]


def test_an_endpoint_that_refuses_with_and_without_log_probs_is_asked_twice_and_no_more(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with endpoint(lambda body: 400) as (url, seen), pytest.raises(ConfigError, match="HTTP 400"):
        judge(url, source, tmp_path / "v.jsonl")
    assert ["logprobs" in body for body in seen] == [True, False]


def test_what_an_endpoint_said_and_could_not_be_read_is_asked_again_when_it_is_mended(tmp_path):
    """A model that thinks first fills its few tokens with that, until it is told not to."""
    source, out = candidates(tmp_path / "c.jsonl", graded(8)), tmp_path / "v.jsonl"
    mended = []
    with endpoint(lambda body: says("A" if mended else "<think>\nHmm")) as (url, seen):
        first, said = judge(url, source, out)
        (warning,) = [line for line in said if line.startswith("warning")]
        assert "10 replies of stub@" in warning
        assert "thinks first" in warning
        assert (tmp_path / "v.jsonl.requests").read_bytes() == b""
        assert next(iter(first.judges.values())).unreadable == 16
        mended.append(True)
        second, said = judge(url, source, out)
        assert not any(line.startswith("warning") for line in said)
        assert (second.written, second.before) == (16, 0)
        assert len(seen) == 32
        assert judge(url, source, out)[0].written == 0
    assert next(iter(second.judges.values())).unreadable == 0
    (_, found) = pairs_check(source, [out])
    assert "unreadable verdict" not in {kind.kind for kind in found.kinds}


def test_an_unreadable_reply_that_an_older_version_kept_is_asked_again(tmp_path):
    source, out = candidates(tmp_path / "c.jsonl", graded(1)), tmp_path / "v.jsonl"
    with endpoint(lambda body: says("A")) as (url, seen):
        judge(url, source, out)
        kept = tmp_path / "v.jsonl.requests"
        kept.write_text(kept.read_text().replace('"A"', '"Hmm"'))
        out.unlink()
        assert judge(url, source, out)[0].written == 2
        assert len(seen) == 4
    assert {v.verdict for v in read_verdicts(out).values()} == {"a", "b"}


def too_long(body):
    return "number 1 " in body["messages"][-1]["content"]


def test_one_question_that_an_endpoint_refuses_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    why = b'{"error":\n "maximum context is 10 tokens", "key": "sk-very-secret"}' + b" more" * 99
    source, out = candidates(tmp_path / "c.jsonl", graded(4)), tmp_path / "v.jsonl"
    with endpoint(lambda body: (400, why) if too_long(body) else says("A")) as (url, seen):
        report, _ = judge(url, source, out)
        assert report.written == 8
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        refused = [row for row in rows if row["verdict"] == "unreadable"]
        assert {row["id"] for row in refused} == {"Question number 1 of many?"}
        assert len(refused) == 2
        assert refused[0]["raw"].startswith('HTTP 400 Bad Request: {"error": "maximum context is')
        assert len(refused[0]["raw"]) < 250
        assert all("logprobs" in body for body in seen)  # it is not they that were refused
        assert len(seen) == 8
        again, _ = judge(url, source, out)  # now it is the first that is asked
        assert (again.written, again.before) == (2, 6)
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()


def test_the_first_refusal_ends_the_run_with_the_endpoints_own_reason(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    refuses = (400, b'{"error": "model \x1b[31mstub is not loaded"}')
    with endpoint(lambda body: refuses) as (url, _), pytest.raises(ConfigError) as error:
        judge(url, source, tmp_path / "v.jsonl")
    assert "HTTP 400 Bad Request: {" in str(error.value)
    assert "stub is not loaded" in str(error.value)
    assert "\x1b" not in str(error.value)


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
    from fpo_mlx.pairs.labels import by_prompt

    turned = by_prompt([said(1, 0, "ba", "b", p=0.1), said(1, 0, "ab", "b", p=0.3)])["id"]
    (left,), (right,) = one, labels_of(turned)
    assert left.verdict == right.verdict == "a"
    assert left.agreement == pytest.approx(0.8)
    assert right.agreement == pytest.approx(0.8)


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


@pytest.mark.parametrize("again", ["a", "both_bad", "skip"])
def test_a_persons_own_text_stands_whatever_they_say_of_the_two_when_they_come_again(again):
    edited = said(0, 1, "ab", "both_bad", judge=PERSON, edited="mine", time=1.0)
    votes = [edited, said(0, 1, "ba", again, judge=PERSON, time=2.0)]
    assert [(label.edited, label.person) for label in labels_of(votes)] == [("mine", True)]
    (of_them,) = summarise(votes, lambda id: [3, 4]).values()
    assert of_them.flip_rate is None  # one says nothing of the two, so they did not turn round


def test_cohens_kappa_by_hand():
    table = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    assert cohen_kappa(table) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")]) is None


# Rewards ------------------------------------------------------------------------------------------


def reward(tmp_path, body, name="score"):
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"{path}:{name}"


def by_reward(tmp_path, spec, count=2, **words):
    source = candidates(tmp_path / "c.jsonl", graded(count, 3))
    return pairs_judge(
        JudgeConfig(reward=spec, **words), candidates=source, output=tmp_path / "v.jsonl",
        say=lambda _: None,
    )  # fmt: skip


def test_a_reward_decides_every_comparison_and_its_prints_do_no_harm(tmp_path):
    spec = reward(
        tmp_path, "def score(prompt, answer):\n    print('hi')\n    return int(answer[-1])\n"
    )
    by_reward(tmp_path, spec, 5)
    for v in read_verdicts(tmp_path / "v.jsonl").values():
        assert v.verdict == ("a" if v.score_a > v.score_b else "b")
        assert v.order == "none"


def test_a_reward_over_lists_is_called_once_a_prompt(tmp_path):
    spec = reward(tmp_path, "def score(prompts, answers):\n    return [len(a) for a in answers]\n")
    assert by_reward(tmp_path, spec).written == 6


def test_a_reward_file_may_hold_a_dataclass_with_annotations_as_texts(tmp_path):
    spec = reward(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Grade:\n"
        "    value: float\n"
        "def score(prompt, answer):\n"
        "    return Grade(int(answer[-1])).value\n",
    )
    assert by_reward(tmp_path, spec).written == 6


def test_a_reward_file_may_import_a_file_beside_it_that_is_called_reward(tmp_path):
    (tmp_path / "reward.py").write_text("def last(answer):\n    return int(answer[-1])\n")
    spec = reward(
        tmp_path,
        "from reward import last\ndef score(prompt, answer):\n    return last(answer)\n",
    )
    assert by_reward(tmp_path, spec).written == 6


@pytest.mark.parametrize(
    ("body", "part"),
    [("return float('nan')", "nan"), ("return None", "TypeError"),
     ("raise ValueError('odd')", "odd"), ("return [1, 2]", "TypeError"),
     ("import os; os._exit(3)", "exit code 3"),
     ("while True: pass", "--timeout"), ("x = bytearray(3 * 10**9); return 1", "MemoryError"),
     ("import sys; sys.exit()", "SystemExit"), ("return float('inf')", "inf")],
)  # fmt: skip
def test_a_reward_that_fails_is_a_plain_error_with_its_row(tmp_path, body, part):
    spec = reward(tmp_path, f"def score(prompt, answer):\n    {body}\n")
    with pytest.raises(DataError, match="id Question number 0") as error:
        by_reward(tmp_path, spec, timeout=2.0, memory_gb=1.0)
    assert part in str(error.value)


@pytest.mark.parametrize(
    "body", ["import nothing_of_the_kind", "def (", "raise SystemExit", "x = 1"]
)
def test_a_file_that_cannot_be_used_is_said_before_the_first_row(tmp_path, body):
    with pytest.raises(ConfigError, match="--reward"):
        by_reward(tmp_path, reward(tmp_path, body))


@pytest.mark.parametrize("spec", ["nothing.py:f", "no-colon", "x.py:not a name", ":f"])
def test_a_reward_that_is_not_there_is_refused(tmp_path, spec):
    with pytest.raises(ConfigError, match="--reward"):
        by_reward(tmp_path, spec)


SLOW = """
import os, sys, time
from fpo_mlx.pairs.reward import Reward
with Reward(sys.argv[1], timeout=60.0, memory_gb=4.0) as reward:
    print(reward._process.pid, flush=True)
    if sys.argv[2] == "asked":
        reward.scores("", ["an answer"], "here")
    time.sleep(60)
"""


def slow(tmp_path, what):
    """A run that waits for its reward, or for nothing; and the number of the reward's process."""
    spec = reward(tmp_path, "import time\ndef score(prompt, answer):\n    time.sleep(30)\n")
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, spec, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    return run, int(run.stdout.readline())


def is_gone(pid):
    """Whether a process ends soon; one that nobody has waited for yet has ended, too."""
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout
        if not state or state.startswith(b"Z"):
            return True
        threading.Event().wait(0.1)
    return False


@pytest.mark.parametrize("what", ["asked", "idle"])
def test_ctrl_c_ends_a_reward_without_a_word_of_its_own(tmp_path, what):
    run, pid = slow(tmp_path, what)
    threading.Event().wait(0.5)  # it is in the function by now, or waits to be asked
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=20)
    assert err.count("Traceback") == 1, (
        err
    )  # the run's own, which the command line turns into words
    assert "reward_child" not in err
    assert is_gone(pid)


def test_a_reward_ends_when_the_run_is_killed(tmp_path):
    run, pid = slow(tmp_path, "idle")
    run.kill()
    run.communicate(timeout=20)
    assert is_gone(pid)


def test_the_examples_prefer_what_they_say():
    from fpo_mlx.pairs.example_rewards import brevity, plainness

    assert brevity("", "Yes.") > brevity("", "Yes, and " * 30) > brevity("", "")
    heavy = "Extraordinary circumstances, notwithstanding, led to delays."
    assert plainness("", "It is so. We saw it.") > plainness("", heavy)
    assert plainness("", "") == -20.0


def test_no_verdict_is_asked_for_twice(tmp_path):
    spec = reward(tmp_path, "def score(prompt, answer):\n    return int(answer[-1])\n")
    assert by_reward(tmp_path, spec, 4).written == 12
    whole = (tmp_path / "v.jsonl").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "v.jsonl").write_bytes(whole[:cut])
        by_reward(tmp_path, spec, 4)
        again = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
        want = [json.loads(line) for line in whole.splitlines()]
        for one in (*again, *want):
            one.pop("time", None)
        assert again == want


def test_prompts_that_are_judged_already_cost_no_wait_for_the_disk(tmp_path, monkeypatch):
    """15,000 of them waited 19 s."""
    spec = reward(tmp_path, "def score(prompt, answer):\n    return int(answer[-1])\n")
    by_reward(tmp_path, spec, 4)
    waits, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (waits.append(file), real(file)))
    again = by_reward(tmp_path, spec, 4)
    assert (again.written, again.before, waits) == (0, 12, [])
