"""The rating page in a real browser: by keys and by clicks, and the file has what was done."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import browser
import pytest
from judges import candidates, graded
from rater import SCRIPT, Rater, last_words, meant, served

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

CHROMIUM = browser.find()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One browser for all: its start takes as long as a test."""
    with browser.opened(str(CHROMIUM), tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


def test_thirty_pairs_by_keys_with_undo_edit_reload_and_a_killed_server(page, tmp_path):
    """Issue 18, must show 5: the file is exactly what was clicked."""
    texts = graded(28) | {"Is this text?": [SCRIPT, "no markup"], "Long?": ["y" * 100_000, "z"]}
    source, out = candidates(tmp_path / "c.jsonl", texts), tmp_path / "v.jsonl"
    keys = ["1", "2", "ArrowLeft", "ArrowRight", "t", "b", " "]
    want, hacked = {}, []
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
        assert page.evaluate("byId('edited').value === byId('answer-1').textContent")
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
    with served(source, out, "--port", address.split(":")[2].split("/")[0]) as (address, _):
        rater.press("1")  # in the page of the earlier start
        rater.wait("document.getElementById('message').textContent.includes('was started anew')")
        page.open(address)
        assert len(last_words(out)) == len(want)
        n = 0
        while (name := rater.current()) is not None:
            key = keys[n % 7]
            hacked.append(page.evaluate("window.hacked"))
            rater.vote(key)
            want[name] = (meant(name, key), None)
            n += 1
        asked = {e["request"]["url"].split("?")[0] for e in page.of("Network.requestWillBeSent")}
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


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, True)])
def test_it_fits_a_phone_and_the_dark_and_every_control_has_a_name(page, tmp_path, width, dark):
    source = candidates(tmp_path / "c.jsonl", graded(3) | {"W?": ["w" * 3000, "v" * 3000]})
    with served(source, tmp_path / "v.jsonl") as (address, _):
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


CLICKS = {
    "[data-choice=first]": "1", "[data-choice=second]": "2", "[data-choice=tie]": "t",
    "[data-choice=both_bad]": "b", "[data-choice=skip]": " ",
}  # fmt: skip


def test_clicks_undo_a_reload_and_a_second_tab_leave_what_was_clicked_to_the_end(page, tmp_path):
    source, out = candidates(tmp_path / "c.jsonl", graded(7)), tmp_path / "v.jsonl"
    want = {}

    def click(rater, button):
        name = rater.moves_on(lambda: rater.click(button))
        want[name] = meant(name, CLICKS[button])
        return name

    with served(source, out) as (address, _):
        page.open(address)
        rater = Rater(page, out)
        for button in CLICKS:
            name = click(rater, button)
            assert last_words(out)[name].verdict == want[name]  # on disk already
        del want[name]
        rater.moves_on(lambda: rater.click("#undo"))
        assert rater.current() == name
        page.open(address)  # reload
        assert rater.current() == name
        other = Rater(page.another(), out)
        other.page.open(address)
        assert other.current() == name
        click(rater, "[data-choice=first]")
        other.moves_on(lambda: other.press("2"))
        assert "another tab" in other.page.evaluate("byId('message').textContent")
        assert other.current() == rater.current()
        while other.current() is not None:
            click(other, "[data-choice=second]")
        other.moves_on(lambda: other.click("#undo-last"))
        click(other, "[data-choice=tie]")
        assert "All done" in other.page.evaluate("document.body.innerText")
        for tab in (page, other.page):
            assert tab.of("Runtime.exceptionThrown") == []
    assert {name: v.verdict for name, v in last_words(out).items()} == want
    assert len(want) >= 7


def test_a_double_click_decides_one_comparison_not_the_next_unseen(page, tmp_path):
    source, out = candidates(tmp_path / "c.jsonl", graded(4)), tmp_path / "v.jsonl"
    with served(source, out) as (address, _):
        page.open(address)
        rater = Rater(page, out)
        first = rater.moves_on(lambda: rater.click("[data-choice=first]"))
        rater.click("[data-choice=first]", times=2)
        second = rater.vote("t")
        assert {name: v.verdict for name, v in last_words(out).items()} == {
            first: meant(first, "1"), second: "tie",
        }  # fmt: skip


NASTY = {
    "Is this text?": [
        "<script>alert(1)</script><img src=x onerror='window.hacked=2'>",
        "&amp; <b>",
    ],
    "Long?": ["y" * 20_000, "w " * 5000],
    "Right to left?": ["مرحبا بالعالم.\nEnglish.", "שלום עולם."],
    "Code?": ["```python\ndef f(x):\n\treturn x\n```\n", "    {{ 7 * 7 }}"],
    "\n".join(f"a long prompt {n}" for n in range(70)): ["a", "b"],
    "\n".join(f"another one {n}" for n in range(70)): ["c", "d"],
}
IN_RANGE = """(() => { const box = byId('answer-0'), range = document.createRange();
  range.setStart(box.firstChild, 0); range.setEnd(box.firstChild, 9);
  return box.getBoundingClientRect().right - range.getBoundingClientRect().right; })()"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_hostile_long_and_foreign_answers_are_text_shown_from_its_beginning(
    page, tmp_path, width, dark
):
    source = tmp_path / "c.jsonl"
    rows = [json.loads(row) for row in candidates(source, NASTY).read_text().splitlines()]
    source.write_text("".join(json.dumps(r | {"id": r["prompt"][:12]}) + "\n" for r in rows))
    seen, from_right = [], {}
    with served(source, tmp_path / "v.jsonl") as (address, _):
        page.open(address, width=width, dark=dark)
        rater = Rater(page, None)
        while rater.current() is not None:
            text, inside = rater.shown()
            seen.append(text)
            assert inside == 0  # text, no element
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            tops = page.evaluate("['prompt', 'answer-0', 'answer-1'].map((n) => byId(n).scrollTop)")
            assert tops == [0, 0, 0], text[0][:20]
            from_right[text[0]] = page.evaluate(IN_RANGE) if "left" in text[0] else None
            page.evaluate("byId('prompt').scrollTop = byId('answer-0').scrollTop = 400")
            rater.vote("t")
        assert page.evaluate("window.hacked") is None
        for event in ("Page.javascriptDialogOpening", "Log.entryAdded", "Runtime.exceptionThrown"):
            assert page.of(event) == []
    wanted = [(prompt, set(answers)) for prompt, answers in NASTY.items()]
    assert [text for text in wanted if text not in seen] == []
    assert from_right["Right to left?"] < 20  # begins at the right, as it is read


def test_the_page_says_of_a_refusal_what_the_server_said(page, tmp_path):
    """Any 403 was called a server that was started anew, and a plain text no answer at all."""
    source, out = candidates(tmp_path / "c.jsonl", graded(2)), tmp_path / "v.jsonl"
    rater, said = Rater(page, out), "document.getElementById('message').textContent"
    with served(source, out) as (address, _):
        page.open(address)
        rater.current()
        for status, text, shown in (
            (403, "foreign host or origin", "foreign host or origin"),
            (413, "too large", "too large"),
            (401, "wrong token", "was started anew"),
        ):
            page.evaluate(
                f"window.fetch = async () => new Response({text!r}, {{status: {status}}}); 1"
            )
            rater.press("1")
            rater.wait(f"!busy && {said}.includes({shown!r})", seconds=5)
