"""Draw docs/drift.svg, the README's picture: what each method of the study learned, and its drift.

    python scripts/make/drift_picture.py          # from scripts/studies/results/reproduce; a second

From the left the reward accuracy on held-out pairs; the margin, by how much more chosen answers
gained than rejected ones, in nats per token; the sequential KL from the base model, in nats per
answer (mean of chosen and rejected). The last two are logarithmic: what is learned and what it
costs. A dot is the mean over the seeds, a line their range. `tests/scripts/test_drift_picture.py`
holds the file to the figures.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "studies" / "results" / "reproduce" / "results.json"
PICTURE = ROOT / "docs" / "drift.svg"
NAMES = {
    "fpo": "FPO", "dpo": "DPO", "simpo": "SimPO", "simpo-kl": "SimPO + KL", "tdpo1": "TDPO1",
    "tdpo2": "TDPO2",
}  # fmt: skip
WIDTH, ROW, TOP = 860, 30, 76
PLAIN, OURS, FAINT, TEXT = "#4d5866", "#1f6fc4", "#d4d9df", "#24292f"


class Panel(NamedTuple):
    title: tuple[str, str]
    left: float  # where it is drawn
    right: float
    ticks: tuple[float, ...]  # the first and the last are its ends
    logarithmic: bool

    def place(self, value: float) -> float:
        at, low, high = value, self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            at, low, high = math.log10(at), math.log10(low), math.log10(high)
        return self.left + (at - low) / (high - low) * (self.right - self.left)

    def said(self, mean: float) -> str:
        return f"{float(f'{mean:.2g}'):g}" if self.logarithmic else f"{mean:.2f}"


ACCURACY = Panel(("reward accuracy", "held-out pairs"), 130, 300, (0.5, 0.75, 1.0), False)
MARGIN = Panel(("margin learned", "nats per token"), 360, 530, (0.01, 0.1, 1, 10), True)
KL = Panel(("drift: KL from the base", "nats per answer"), 590, 790, (0.1, 1, 10, 100, 1000), True)
PANELS = (ACCURACY, MARGIN, KL)


def figures(summary: Mapping[str, float]) -> tuple[float, ...]:
    """Of a run, in the order of PANELS."""
    changes = (summary[f"logps_per_token/{side}_change"] for side in ("chosen", "rejected"))
    chosen, rejected = changes
    kl = (summary["kl/chosen"] + summary["kl/rejected"]) / 2
    return summary["rewards/accuracies"], chosen - rejected, kl


def methods(results: Mapping[str, Any]) -> dict[str, list[tuple[float, ...]]]:
    """`figures` of every seed, by method, the smallest drift first."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for cell in results["cells"]:
        if cell["group"] == "method":
            found.setdefault(cell["name"], []).append(figures(cell["summary"]))
    drift = PANELS.index(KL)
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(s[drift] for s in item[1])))


def draw(results: Mapping[str, Any]) -> str:
    """The picture as SVG."""
    rows = methods(results)
    stopped = {cell["name"] for cell in results["cells"] if cell["status"] == "diverged"}
    bottom = TOP + ROW * len(rows)
    parts: list[str] = []
    for panel in PANELS:
        middle = (panel.left + panel.right) / 2
        first, second = panel.title
        parts += [text(middle, 24, first, "middle", bold=True), text(middle, 42, second, "middle")]
        for tick in panel.ticks:
            at = panel.place(tick)
            parts += [line(at, TOP - 14, at, bottom, FAINT, 1)]
            parts += [text(at, bottom + 16, f"{tick:g}", "middle")]
    for i, (name, seeds) in enumerate(rows.items()):
        y, colour = TOP + ROW * i + 6, OURS if name == "fpo" else PLAIN
        label = NAMES.get(name, name) + (", stopped" if name in stopped else "")
        parts.append(text(ACCURACY.left - 14, y + 4, label, "end", bold=name == "fpo"))
        for panel, values in zip(PANELS, zip(*seeds, strict=True), strict=True):
            parts += dot(panel, values, y, colour)
    height = bottom + 30
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13" stroke-linecap="round">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def dot(panel: Panel, values: Sequence[float], y: float, colour: str) -> list[str]:
    """The range over the seeds, the mean, and the mean in digits to the right of the range."""
    mean, end = statistics.fmean(values), panel.place(max(values))
    return [
        line(panel.place(min(values)), y, end, y, colour, 3),
        f'<circle cx="{panel.place(mean):.1f}" cy="{y}" r="5.5" fill="{colour}"/>',
        text(end + 10, y + 4, panel.said(mean), "start"),
    ]


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" '
        f'stroke="{colour}" stroke-width="{width}"/>'
    )


def text(x: float, y: float, words: str, anchor: str, bold: bool = False) -> str:
    look = (
        f'fill="{TEXT}" stroke="#ffffff" stroke-width="4" paint-order="stroke"'  # over grid lines
    )
    look += ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" {look}>{words}</text>'


def main() -> int:
    PICTURE.write_text(draw(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
