"""The rating page before axe-core, and in two tabs at once, in a headless Chromium.

    npm install --prefix /tmp/axe axe-core
    python scripts/checks/rate_page.py --axe /tmp/axe/node_modules/axe-core/axe.min.js

axe-core looks at the page at 1200 and 390 px, light and dark: while a comparison is shown, with the
editor open, with the help open, and when all is done. Then two tabs vote on one file in turns: each
vote is in the file once, and the slower tab is told so and shown the next. Exits 1 on a serious or
critical fault, or a vote that is lost or doubled.
"""

from __future__ import annotations

import argparse
import atexit
import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import browser  # noqa: E402
from axe import found_by_axe, wait  # noqa: E402
from judges import candidates, graded  # noqa: E402

READY = "!busy && (current !== null || !document.getElementById('done').hidden)"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the package")
    o = parser.parse_args()
    chromium = browser.find()
    if chromium is None:
        sys.exit("no Chromium on the PATH")
    with tempfile.TemporaryDirectory(prefix="rate-") as folder:
        root = Path(folder)
        source = candidates(root / "c.jsonl", graded(6))
        with browser.opened(chromium, root / "profile") as page:
            faults = looked_at(page, source, root / "a.jsonl", o.axe.read_text())
            faults += two_tabs(page, source, root / "b.jsonl")
    print(f"{len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return bool(faults)


def serve(source: Path, out: Path) -> tuple[str, subprocess.Popen]:
    words = ["pairs", "rate", str(source), "--output", str(out), "--no-browser"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fpo_mlx", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)  # also where this check fails
    assert process.stderr is not None
    found = re.search(r"http://\S+", process.stderr.readline())
    if not found:
        sys.exit("the server did not start")
    return found[0], process


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def looked_at(page: Any, source: Path, out: Path, axe: str) -> list[str]:
    """What axe-core finds serious, in every state of the page."""
    address, process = serve(source, out)
    states = {
        "comparison": "0", "editor": "edit(0)",
        "help": "byId('editor').close(); byId('help').showModal()",
    }  # fmt: skip
    faults = []
    for width, dark in ((1200, False), (1200, True), (390, False), (390, True)):
        page.open(address, width=width, dark=dark)
        wait(page, READY)
        page.evaluate(axe)
        for name, script in states.items():
            page.evaluate(script)
            faults += found_by_axe(page, f"{name}, {width} px, {'dark' if dark else 'light'}")
    page.evaluate("byId('help').close()")
    while page.evaluate("current !== null"):
        page.evaluate("vote('tie')")
        wait(page, "!busy")
    faults += found_by_axe(page, "all done")
    stop(process)
    return faults


def two_tabs(page: Any, source: Path, out: Path) -> list[str]:
    """Both show the same; the second one's vote on it is refused, and it is shown the next."""
    address, process = serve(source, out)
    tabs = (page, page.another())
    for tab in tabs:
        tab.open(address)
        wait(tab, READY)
    faults, votes = [], 0
    while (name := page.evaluate("current")) is not None:
        if tabs[1].evaluate("current") != name:
            faults.append(f"the tabs show different comparisons, {name} in the first")
            break
        for tab, choice in zip(tabs, ("first", "second"), strict=True):
            tab.evaluate(f"vote('{choice}')")
            wait(tab, "!busy")
        votes += 1
        if "another tab" not in tabs[1].evaluate("byId('message').textContent"):
            faults.append(f"{name}: the second tab was not told")
    stop(process)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = {(v["id"], v["a"], v["b"], v["order"]) for v in lines}
    print(f"two tabs: {votes} comparisons, {len(lines)} lines, {len(names)} different")
    if not votes or not votes == len(lines) == len(names):
        faults.append(f"{votes} votes, {len(lines)} lines, {len(names)} different")
    return faults


if __name__ == "__main__":
    sys.exit(main())
