"""The rating page as a user starts it, and a person at it in a headless browser."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

from fpo_mlx.pairs.records import read_verdicts

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
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        yield found[0], process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


class Rater:
    """A page and what a person does on it."""

    def __init__(self, page, votes):
        self.page, self.votes = page, votes

    def press(self, key, *, text=None, modifiers=0):
        one = {"key": key, "modifiers": modifiers} | ({"text": text} if text else {})
        self.page.send("Input.dispatchKeyEvent", type="keyDown", **one)
        self.page.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def click(self, selector, times=1):
        """The mouse on the middle of a control; times: the number of this click in a row."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.page.evaluate(f"{where}.scrollIntoView({{block: 'nearest'}})")
        box = json.loads(self.page.evaluate(f"JSON.stringify({where}.getBoundingClientRect())"))
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.page.send(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=times, **at
            )

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
        return self.moves_on(lambda: self.press(key))

    def moves_on(self, act):
        """Do this; the item that was shown, when another stands."""
        name = self.current()
        act()
        self.wait(f"!busy && current !== {json.dumps(name)}")
        return name

    def shown(self):
        """(prompt, answers) as the page holds them, and how many elements are in them."""
        script = (
            "JSON.stringify(['prompt', 'answer-0', 'answer-1'].map(byId).map((e) => "
            "[e.textContent, e.childElementCount]))"
        )
        texts, inside = zip(*json.loads(self.page.evaluate(script)), strict=True)
        return (texts[0], set(texts[1:])), sum(inside)


def last_words(path):
    return {
        f"{v.id}:{v.a}:{v.b}:{v.order}": v for v in read_verdicts(path).values()
    }  # fmt: skip


def meant(name, key):
    order = name.rsplit(":", 1)[1]
    if key in SIDES:
        return order[SIDES[key]]
    return {"t": "tie", "b": "both_bad", " ": "skip"}[key]
