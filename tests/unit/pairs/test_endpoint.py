"""A judge behind an endpoint: faults on the way, refusals, log-probs, and what is kept of it."""

from __future__ import annotations

import json
import math
import ssl
import threading
import time
import urllib.error
import urllib.request

import pytest
from judges import candidates, endpoint, graded, grades, says

from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.pairs.question import read_reply
from fpo_mlx.pairs.records import read_verdicts
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.pipeline import pairs_check, pairs_judge


def judge(url, source, out, model="stub", **words):
    said = []
    settings = JudgeConfig(judge_url=url, judge_model=model, **words)
    report = pairs_judge(settings, candidates=source, output=out, say=said.append)
    return report, said


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


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
        with pytest.raises(FpoError, match="timed out") as error:
            judge(url, source, tmp_path / "v.jsonl", retries=1, timeout=0.2)
        assert "raise --timeout, 0.2 seconds now" in str(error.value)
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


EMPTY = ["<think>", "\n\n", "</think>", "\n\n"]  # of Qwen3 where the user's turn says /no_think


def unthinking(body, letters=True, hidden=False):
    """What it says then, as far as the tokens asked for go. hidden: the text without the block."""
    a, b = (0.9, 0.1) if grades(body)[0] else (0.1, 0.9)
    tokens = [*EMPTY, "A" if a > b else "B"][: body["max_tokens"]]
    reply = says("".join(tokens[len(EMPTY) if hidden else 0 :]))
    if letters:
        tops = [[{"token": t, "logprob": 0.0}] for t in EMPTY]
        tops.append([{"token": t, "logprob": math.log(p)} for t, p in (("A", a), ("B", b))])
        content = [{"token": t, "logprob": 0.0, "top_logprobs": top}
                   for t, top in zip(tokens, tops, strict=False)]  # fmt: skip
        reply["choices"][0]["logprobs"] = {"content": content}
    return reply


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("letters", [False, True])
def test_a_letter_behind_an_empty_thought_is_read_and_so_are_its_log_probs(
    tmp_path, letters, hidden
):
    source = candidates(tmp_path / "c.jsonl", graded(3))
    with endpoint(lambda body: unthinking(body, letters, hidden)) as (url, _):
        report, _ = judge(url, source, tmp_path / "v.jsonl")
    (summary,) = report.judges.values()
    assert (summary.unreadable, summary.flip_rate) == (0, 0)
    for found in read_verdicts(tmp_path / "v.jsonl").values():
        sure = max(found.p or 0, 1 - (found.p or 0))
        assert sure == pytest.approx(0.9 if letters else 1.0)


@pytest.mark.parametrize(
    "text", ["<think>\nHmm, A", "<think>\nHmm\n</think>\n\nA", "<think>", "A</think>"]
)
def test_a_thought_that_is_not_empty_is_no_letter(text):
    assert read_reply(says(text))[0] is None


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
        assert len(seen) > 8
        assert (again.written, again.before) == (0, 6)  # refused again: it stands there
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()


def test_that_one_model_has_answered_says_nothing_of_another(tmp_path):
    source, out = candidates(tmp_path / "c.jsonl", graded(2)), tmp_path / "v.jsonl"
    known = {"stub": says("A")}
    with endpoint(lambda body: known.get(body["model"], (400, b"no such model"))) as (url, _):
        judge(url, source, out)
        before = out.read_bytes()
        with pytest.raises(ConfigError, match=r"no such model\. Check --judge-model"):
            judge(url, source, out, model="stubb")
    assert out.read_bytes() == before


def test_the_first_refusal_ends_the_run_with_the_endpoints_own_reason(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    refuses = (400, b'{"error": "model \x1b[31mstub is not loaded"}')
    with endpoint(lambda body: refuses) as (url, _), pytest.raises(ConfigError) as error:
        judge(url, source, tmp_path / "v.jsonl")
    assert "HTTP 400 Bad Request: {" in str(error.value)
    assert "stub is not loaded" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_key_that_no_request_can_carry_is_refused_without_being_shown(tmp_path, monkeypatch):
    """urllib says `Invalid header value b'Bearer sk-…'`."""
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with endpoint(lambda body: says("A")) as (url, seen):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")  # the end of a line is no part of it
        judge(url, source, tmp_path / "v.jsonl")
        assert len(seen) == 2
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\rsecret")
        with pytest.raises(ConfigError, match="OPENAI_API_KEY: the key has characters") as error:
            judge(url, source, tmp_path / "w.jsonl")
    assert "secret" not in str(error.value)


def test_a_certificate_that_is_not_trusted_is_said_at_once(tmp_path, monkeypatch):
    tried, why = [], ssl.SSLCertVerificationError("self-signed certificate")

    def fails(self, request, **_):
        tried.append(request)
        raise urllib.error.URLError(why)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fails)
    source = candidates(tmp_path / "c.jsonl", graded(1))
    with pytest.raises(ConfigError, match="not trusted: .*self-signed.*SSL_CERT_FILE"):
        judge("https://judge.example/v1", source, tmp_path / "v.jsonl")
    assert len(tried) == 1


# Errors within a reply of 200 ---------------------------------------------------------------------


def test_an_unknown_path_that_is_answered_with_200_is_said_at_once_with_its_reason(tmp_path):
    """LM Studio, where --judge-url lacks its /v1. It was asked for a minute, its reason lost."""
    source = candidates(tmp_path / "c.jsonl", graded(2))
    said = {"error": "Unexpected endpoint or method. (POST /chat/completions)"}
    with endpoint(lambda body: said) as (url, seen), pytest.raises(ConfigError) as error:
        judge(url, source, tmp_path / "v.jsonl")
    assert len(seen) == 1
    assert "Unexpected endpoint or method. (POST /chat/completions)" in str(error.value)
    assert "ends in /v1" in str(error.value)


def test_a_code_within_a_reply_of_200_counts_as_the_replys_own(tmp_path, monkeypatch):
    """OpenRouter so says that it is asked too often, and which request it refuses."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    source, calls = candidates(tmp_path / "c.jsonl", graded(3)), []
    busy = {"error": {"code": 429, "message": "slowly, sk-very-secret"}}

    def shaky(body):
        calls.append(1)
        return busy if len(calls) % 2 else says("A")

    with endpoint(shaky) as (url, seen):
        assert judge(url, source, tmp_path / "v.jsonl")[0].written == 6
        assert len(seen) == 12
    with endpoint(lambda body: busy) as (url, _), pytest.raises(FpoError) as error:
        judge(url, source, tmp_path / "w.jsonl", retries=1)
    assert "after 2 tries, the last: HTTP 429" in str(error.value)
    assert "slowly, …" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("code", [401, "401"])
def test_a_refusal_within_a_reply_of_200_is_said_at_once(tmp_path, code):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    said = {"error": {"code": code, "message": "no such key"}, "choices": None}
    with endpoint(lambda body: said) as (url, seen), pytest.raises(ConfigError) as error:
        judge(url, source, tmp_path / "v.jsonl")
    assert len(seen) == 1
    assert "no such key" in str(error.value)
    assert "environment variable" in str(error.value)


@pytest.mark.parametrize("code", [None, "busy", True, 7, [], 200])
def test_an_error_of_no_known_code_is_asked_again_and_its_reason_told(tmp_path, code):
    source = candidates(tmp_path / "c.jsonl", graded(1))
    said = {"error": {"code": code, "message": "the model\n is loading"}}
    with endpoint(lambda body: said) as (url, seen), pytest.raises(FpoError) as error:
        judge(url, source, tmp_path / "v.jsonl", retries=2)
    assert len(seen) == 3
    assert "no answer after 3 tries" in str(error.value)
    assert "is loading" in str(error.value)


def test_an_error_within_the_first_reply_does_not_pass_for_an_answer(tmp_path):
    """After an answer a refusal is of one question; before one it is of the settings."""
    source = candidates(tmp_path / "c.jsonl", graded(1))
    replies = [{"error": "loading"}, 400, 400]
    with endpoint(lambda body: replies.pop(0)) as (url, _), pytest.raises(ConfigError) as error:
        judge(url, source, tmp_path / "v.jsonl")
    assert "--judge-model" in str(error.value)


def test_log_probs_that_are_refused_within_a_reply_of_200_are_done_without(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(1))
    said = {"error": {"code": 400, "message": "no logprobs here"}}
    with endpoint(lambda body: said if "logprobs" in body else says("A")) as (url, seen):
        assert judge(url, source, tmp_path / "v.jsonl")[0].written == 2
    assert len(seen) == 3
