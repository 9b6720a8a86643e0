"""The rating page: what it lets through, and what it shows next."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refused, run
from judges import candidates, graded
from rater import SCRIPT, served

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from fpo_mlx.errors import FpoError  # noqa: E402
from fpo_mlx.pairs.labels import labels_of  # noqa: E402
from fpo_mlx.pairs.rating import Rating, Refused, queue  # noqa: E402
from fpo_mlx.pairs.records import open_candidates, read_verdicts  # noqa: E402


def ask(address, path="/next", body=b"{}", method="POST", **headers):
    """(status, body, headers) of one request with the page's own headers, changed as asked."""
    host, port, token = re.match(r"http://([\d.]+):(\d+)/\?token=(.+)", address).groups()
    given = {"Host": f"{host}:{port}", "X-Token": token, "Origin": f"http://{host}:{port}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())
    finally:
        connection.close()


def test_ctrl_c_is_the_way_to_end_and_says_what_was_voted(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    process = subprocess.Popen(
        [sys.executable, "-m", "fpo_mlx", "pairs", "rate", str(source), "--no-browser",
         "--output", str(tmp_path / "v.jsonl")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ask(re.search(r"http://\S+", process.stderr.readline())[0])  # it serves
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"0 votes in {tmp_path / 'v.jsonl'}" in out


@pytest.fixture(scope="module")
def open_page(tmp_path_factory):
    root = tmp_path_factory.mktemp("rate")
    source = candidates(root / "c.jsonl", {"Why?": [SCRIPT, "x" * (1 << 20)], **graded(5)})
    with served(source, root / "v.jsonl") as (address, _):
        yield address, root / "v.jsonl"


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://evil.example"},
     {"Origin": "null"}, {"X_Token": "wrong"}, {"X_Token": None}, {"X_Token": ""},
     {"Host": "localhost.evil.example"}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/next", "/vote", "/undo"])
def test_what_comes_from_elsewhere_or_without_the_token_is_refused(open_page, path, headers):
    address, votes = open_page
    before = votes.read_bytes()
    status, body, _ = ask(address, path, **headers)
    assert status == (401 if "X_Token" in headers else 403)  # the page says why of the first only
    assert b"Question" not in body
    assert votes.read_bytes() == before


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css"])
def test_the_pages_parts_need_the_token_and_run_nothing_inline(open_page, path):
    address, _ = open_page
    assert ask(address, path, method="GET", X_Token=None)[0] == 401
    status, body, headers = ask(address, path, method="GET", Origin=None)
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["referrer-policy"] == "no-referrer"
    if path == "/":
        assert re.findall(rb"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", body) == []


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[" * 100_000, b"[]", b'{"name": 3, "choice": "first"}', b"\xff",
     b'{"name": "../../etc/passwd:0:1:ab", "choice": "first"}', b'{"name": "x", "choice": "q"}',
     b'{"name": "x", "choice": "first", "edited": {"side": 2, "text": "a"}}'],
)  # fmt: skip
def test_requests_that_no_page_sends_are_refused_and_write_nothing(open_page, body):
    address, votes = open_page
    before = votes.read_bytes()
    status, reply, _ = ask(address, "/vote", body)
    assert status == 409
    assert json.loads(reply)["message"]
    assert votes.read_bytes() == before


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/page.html", "/%2e%2e/app.py", "/docs"])
def test_no_other_file_is_served(open_page, path):
    assert ask(open_page[0], path, method="GET")[0] == 404


def test_a_request_that_is_too_large_is_refused(open_page):
    assert ask(open_page[0], "/vote", b"x" * (9 << 20))[0] == 413


def test_the_server_listens_on_the_loopback_only(open_page):
    port = int(re.search(r":(\d+)/", open_page[0])[1])
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("no /proc here")
    hexed = [line.split()[1] for line in table.read_text().splitlines()[1:]]
    assert [where for where in hexed if where.endswith(f":{port:04X}")][0].startswith("0100007F")


# What is shown ------------------------------------------------------------------------------------


def test_sides_are_left_to_chance_and_some_come_again_the_other_way_round(tmp_path):
    found = open_candidates(candidates(tmp_path / "c.jsonl", graded(400, 3)))
    items = queue(found, 1, 0)
    first = [item for item in items if not item.again]
    assert len(first) == 400
    assert 0.4 < sum(item.order == "ab" for item in first) / 400 < 0.6
    again = [item for item in items if item.again]
    assert 8 <= len(again) <= 35  # 5 % of 400
    at = {(i.id, i.a, i.b, i.again): n for n, i in enumerate(items)}
    orders = {(i.id, i.again): i.order for i in items}
    for item in again:
        assert orders[item.id, False] == item.order[::-1]
        if at[item.id, item.a, item.b, False] < 380:
            assert at[item.id, item.a, item.b, True] - at[item.id, item.a, item.b, False] > 10


def test_the_second_tab_of_an_old_comparison_changes_nothing(tmp_path):
    rating = Rating(candidates(tmp_path / "c.jsonl", graded(3)), tmp_path / "v.jsonl")
    name = rating.next()["name"]
    rating.vote(name, "first")
    with pytest.raises(Refused, match="another tab"):
        rating.vote(name, "second")
    rating.close()
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 1


def test_an_answer_that_the_editor_only_gave_other_line_ends_was_not_changed(tmp_path):
    """A text field of a page has \\n for what the answer has as \\r\\n or \\r."""
    source = candidates(tmp_path / "c.jsonl", {"Q?": ["one\r\ntwo\rthree", "four"]})
    rating = Rating(source, tmp_path / "v.jsonl")
    shown = rating.next()
    side = shown["answers"].index("one\r\ntwo\rthree")
    with pytest.raises(Refused, match="not changed"):
        rating.vote(shown["name"], "both_bad", edited=(side, "one\ntwo\nthree"))
    rating.vote(shown["name"], "both_bad", edited=(side, "one\n\ntwo\nthree"))
    rating.close()


def test_what_was_undone_is_shown_again_in_the_next_sitting_too(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(3))
    rating = Rating(source, tmp_path / "v.jsonl")
    names = []
    for choice in ("first", "tie", "second"):
        names.append(rating.next()["name"])
        rating.vote(names[-1], choice)
    assert rating.undo()
    assert rating.undo()
    rating.close()
    rating = Rating(source, tmp_path / "v.jsonl")
    assert rating.next()["name"] == names[1]
    assert rating.undo()  # the one of the sitting before
    assert rating.next()["name"] == names[0]
    assert not rating.undo()
    rating.close()


def test_an_undo_that_could_not_be_written_took_nothing_back(tmp_path, monkeypatch):
    """On a full disk: the next one took back the vote before it."""
    rating = Rating(candidates(tmp_path / "c.jsonl", graded(3)), tmp_path / "v.jsonl")
    names = []
    for choice in ("first", "second"):
        names.append(rating.next()["name"])
        rating.vote(names[-1], choice)

    def full(*_):
        raise FpoError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(rating._writer, "append", full)
        with pytest.raises(FpoError):
            rating.undo()
    assert rating.undo()
    assert rating.next()["name"] == names[1]
    rating.close()


def test_what_a_person_wrote_anew_does_not_come_again_with_its_sides_swapped(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(60))
    again = [item for item in queue(open_candidates(source), 1, 0) if item.again]
    rating = Rating(source, tmp_path / "v.jsonl")
    seen = []
    while not (shown := rating.next())["done"]:
        seen.append(shown["name"])
        rating.vote(shown["name"], "first", edited=(0, f"mine {len(seen)}"))
    assert len(seen) == 60 < 60 + len(again)
    state = rating.next()
    assert (state["voted"], state["total"], state["seconds_left"]) == (60, 60, 0.0)
    rating.close()


def test_a_vote_that_names_no_texts_can_be_taken_back_too(tmp_path):
    """Of an older version: its line is the one that has to be overruled."""
    source, out = candidates(tmp_path / "c.jsonl", {"Q?": ["one", "two"]}), tmp_path / "v.jsonl"
    rating = Rating(source, out)
    rating.vote(rating.next()["name"], "first")
    rating.close()
    line = json.loads(out.read_text())
    del line["texts"]
    out.write_text(json.dumps(line) + "\n")
    rating = Rating(source, out)
    assert rating.undo()
    assert labels_of(list(read_verdicts(out).values())) == []
    rating.vote(rating.next()["name"], "second")
    rating.close()
    (label,) = labels_of(list(read_verdicts(out).values()))
    assert label.verdict != line["verdict"]


def test_votes_on_answers_that_were_there_before_are_none_on_those_that_came_after(tmp_path):
    out = tmp_path / "v.jsonl"
    before = candidates(tmp_path / "before.jsonl", {"Q?": ["one", "two"]})
    after = candidates(tmp_path / "after.jsonl", {"Q?": ["three", "four"]})
    for source in (before, after):
        rating = Rating(source, out)
        rating.vote(rating.next()["name"], "first")
        assert rating.next()["done"]
        rating.close()
    assert len(read_verdicts(out)) == 2


def test_a_port_that_is_taken_and_a_file_without_comparisons_are_plain_errors(tmp_path, open_page):
    port = re.search(r":(\d+)/", open_page[0])[1]
    source = candidates(tmp_path / "c.jsonl", graded(3))
    words = ["--output", tmp_path / "v.jsonl", "--no-browser"]
    refused(run("pairs", "rate", source, *words, "--port", port), 2, f"--port {port}")
    same = candidates(tmp_path / "same.jsonl", {"Why?": ["So.", "So."]})
    refused(run("pairs", "rate", same, *words), 3, "no prompt has two different answers")
