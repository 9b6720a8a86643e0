"""Written pages (reports, feature pages, maps) before axe-core, in a headless Chromium.

    npm install --prefix /tmp/axe axe-core
    fpo-mlx features show 812 --model M --sae S --data pairs/ --output 812.html
    python scripts/checks/pages.py 812.html --axe /tmp/axe/node_modules/axe-core/axe.min.js

Each page at 1200 and 390 px, light and dark. It must ask for nothing elsewhere, print nothing to
the console and scroll only downwards. Exits 1 on a serious or critical fault.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import browser  # noqa: E402
from axe import found_by_axe  # noqa: E402

LOOKS = ((1200, False), (1200, True), (390, False), (390, True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the package")
    parser.add_argument("--pictures", type=Path, help="folder to keep a picture of each look in")
    o = parser.parse_args()
    chromium = browser.find()
    if chromium is None:
        sys.exit("no Chromium on the PATH")
    faults: list[str] = []
    if o.pictures:
        o.pictures.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="pages-") as folder,
        browser.opened(chromium, Path(folder)) as page,
    ):
        for path, (width, dark) in itertools.product(o.pages, LOOKS):
            state = f"{path.name}, {width} px, {'dark' if dark else 'light'}"
            page.open(path.resolve().as_uri(), width=width, dark=dark)
            faults += looked_at(page, path, state)
            if o.pictures:
                page.screenshot(o.pictures / f"{path.stem}-{width}-{dark:d}.png")
            page.evaluate(o.axe.read_text())
            faults += found_by_axe(page, state)
    print(f"{len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return bool(faults)


def looked_at(page: Any, path: Path, state: str) -> list[str]:
    """What a page that stands alone must not do."""
    asked = {event["request"]["url"] for event in page.of("Network.requestWillBeSent")}
    elsewhere = {url for url in asked if not url.startswith(("data:", path.resolve().as_uri()))}
    said = [
        event for name in ("Log.entryAdded", "Runtime.exceptionThrown") for event in page.of(name)
    ]
    wide = page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    return [
        *(f"{state}: asks for {url}" for url in sorted(elsewhere)),
        *(f"{state}: says {event}" for event in said),
        *([f"{state}: {wide} px wider than the window"] if wide > 0 else []),
    ]


if __name__ == "__main__":
    sys.exit(main())
