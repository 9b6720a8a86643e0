"""The rating page: what it lets through, and 30 pairs rated by keys in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import browser
import pytest
from command_line import refused, run
from judges import candidates, graded

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from fpo_mlx.pairs.labels import labels_of  # noqa: E402
from fpo_mlx.pairs.rating import Rating, Refused, queue  # noqa: E402
from fpo_mlx.pairs.records import open_candidates, read_verdicts  # noqa: E402

SCRIPT = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
SIDES = {"1": 0, "ArrowLeft": 0, "2": 1, "ArrowRight": 1}


@contextmanager
def served(source, out, *words):
    """(address, process) of the server as a user starts it."""
    command = [sys.executable, "-m", "fpo_mlx", "pairs", "rate", str(source)]
    process = subprocess.Popen(
        [*command, "--output", str(out), "--no-browser", *map(str, words)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        yield re.search(r"http://\S+", line)[0], process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


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
    assert status == 403
    assert b"Question" not in body
    assert votes.read_bytes() == before


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css"])
def test_the_pages_parts_need_the_token_and_run_nothing_inline(open_page, path):
    address, _ = open_page
    assert ask(address, path, method="GET", X_Token=None)[0] == 403
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


# In a browser -------------------------------------------------------------------------------------

CHROMIUM = browser.find()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


class Rater:
    """A page and what a person does on it."""

    def __init__(self, page, votes):
        self.page, self.votes = page, votes

    def press(self, key, *, text=None, modifiers=0):
        one = {"key": key, "modifiers": modifiers} | ({"text": text} if text else {})
        self.page.send("Input.dispatchKeyEvent", type="keyDown", **one)
        self.page.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def wait(self, script, seconds=30):
        until = time.monotonic() + seconds
        while not self.page.evaluate(script):
            assert time.monotonic() < until, script
            time.sleep(0.02)

    def current(self):
        self.wait("!busy && (current !== null || !document.getElementById('done').hidden)")
        return self.page.evaluate("current")

    def vote(self, key):
        """Press a key; the item that was shown, when the next one stands."""
        name = self.current()
        self.press(key)
        self.wait(f"!busy && current !== {json.dumps(name)}")
        return name


def last_words(path):
    return {
        f"{v.id}:{v.a}:{v.b}:{v.order}": v for v in read_verdicts(path).values()
    }  # fmt: skip


def meant(name, key):
    order = name.rsplit(":", 1)[1]
    if key in SIDES:
        return order[SIDES[key]]
    return {"t": "tie", "b": "both_bad", " ": "skip"}[key]


@needs_browser
def test_thirty_pairs_by_keys_with_undo_edit_reload_and_a_killed_server(tmp_path):
    """Issue 18, must show 5: the file is exactly what was clicked."""
    texts = graded(28) | {"Is this text?": [SCRIPT, "no markup"], "Long?": ["y" * 100_000, "z"]}
    source, out = candidates(tmp_path / "c.jsonl", texts), tmp_path / "v.jsonl"
    keys = ["1", "2", "ArrowLeft", "ArrowRight", "t", "b", " "]
    want, hacked = {}, []
    with browser.opened(CHROMIUM, tmp_path / "profile") as page:
        rater = Rater(page, out)
        with served(source, out) as (address, process):
            page.open(address)
            for n in range(12):
                name = rater.vote(keys[n % 7])
                want[name] = (meant(name, keys[n % 7]), None)
                assert last_words(out)[name].verdict == want[name][0]  # on disk already
            for _ in range(3):  # undo three, and decide them otherwise
                rater.current()
                shown = page.evaluate("current")
                rater.press("Backspace")
                rater.wait(f"!busy && current !== {json.dumps(shown)}")
            for key in ("2", "1", "t"):
                name = rater.vote(key)
                want[name] = (meant(name, key), None)
            name = rater.current()
            rater.press("E", text="E")
            rater.wait("document.getElementById('editor').open")
            page.send("Input.insertText", text=" and more")
            rater.press("Enter", modifiers=2)
            rater.wait(f"!busy && current !== {json.dumps(name)}")
            want[name] = ("both_bad", " and more")
            page.open(address)  # reload
            assert rater.current() not in want
            hacked.append(page.evaluate("window.hacked"))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            rater.press("1")
            rater.wait("document.getElementById('message').textContent.includes('not answer')")
            faults = [e for e in page.of("Runtime.exceptionThrown")]
        with served(source, out) as (address, _):
            page.open(address)
            assert len(last_words(out)) == len(want)
            n = 0
            while (name := rater.current()) is not None:
                key = keys[n % 7]
                hacked.append(page.evaluate("window.hacked"))
                rater.vote(key)
                want[name] = (meant(name, key), None)
                n += 1
            asked = {
                e["request"]["url"].split("?")[0] for e in page.of("Network.requestWillBeSent")
            }
            faults += page.of("Runtime.exceptionThrown") + page.of("Log.entryAdded")
            assert "All done" in page.evaluate("document.body.innerText")
    assert faults == []
    assert set(hacked) == {None}
    here = address.split("?")[0]
    assert {url for url in asked if not url.startswith(("data:", here))} == set()
    found = last_words(out)
    assert len(want) >= 30
    assert {name: v.verdict for name, v in found.items()} == {n: w[0] for n, w in want.items()}
    (edited,) = [(name, v.edited) for name, v in found.items() if v.edited]
    assert edited[1].endswith(" and more")
    assert want[edited[0]][1]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, True)])
def test_it_fits_a_phone_and_the_dark_and_every_control_has_a_name(tmp_path, width, dark):
    source = candidates(tmp_path / "c.jsonl", graded(3) | {"W?": ["w" * 3000, "v" * 3000]})
    with (
        browser.opened(CHROMIUM, tmp_path / "profile") as page,
        served(source, tmp_path / "v.jsonl") as (address, _),
    ):
        page.open(address, width=width, dark=dark)
        Rater(page, None).current()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tops = page.evaluate(
            "[0, 1].map((n) => document.getElementById(`answer-${n}`).getBoundingClientRect().top)"
        )
        assert (tops[0] < tops[1]) == (width < 700)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(20, 23, 27)") == dark
        tree = page.send("Accessibility.getFullAXTree")["nodes"]
        if place := os.environ.get("FPO_MLX_SCREENSHOTS"):
            page.screenshot(Path(place) / f"rate-{width}-{'dark' if dark else 'light'}.png")
    roles = ("button", "group", "progressbar", "textbox")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in tree
        if node.get("role", {}).get("value") in roles and not node.get("ignored")
    ]
    assert len(named) >= 12
    assert [role for role, name in named if not name] == []
