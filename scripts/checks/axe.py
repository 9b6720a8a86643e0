"""axe-core in a page that is open. A part."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

SERIOUS = ("serious", "critical")


def wait(page: Any, script: str) -> None:
    until = time.monotonic() + 60
    while not page.evaluate(script):
        if time.monotonic() > until:
            sys.exit(f"waited in vain for {script}")
        time.sleep(0.02)


def found_by_axe(page: Any, state: str) -> list[str]:
    """The serious faults that axe-core, which the page has evaluated, finds in it as it stands."""
    page.evaluate("window.found = null; axe.run().then((r) => { window.found = r; }); 0")
    wait(page, "window.found !== null")
    passed = page.evaluate("window.found.passes.length")
    told = json.loads(
        page.evaluate(
            "JSON.stringify(window.found.violations.map((v) => "
            "[v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 80))]))"
        )
    )
    print(f"{state}: {passed} rules passed, {len(told)} violated {[one[1] for one in told]}")
    return [f"{state}: {one}" for one in told if one[0] in SERIOUS]
