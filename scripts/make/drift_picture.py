"""Draw docs/drift.svg, the README's picture: accuracy and drift of each method of the study.

    python scripts/make/drift_picture.py          # from scripts/studies/results/reproduce; a second

Left the reward accuracy on held-out pairs, right the sequential KL from the base model, in nats per
answer (mean of chosen and rejected), on a logarithmic axis. A dot is the mean over the seeds, a
line their range. `tests/scripts/test_drift_picture.py` holds the file to the figures.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "studies" / "results" / "reproduce" / "results.json"
PICTURE = ROOT / "docs" / "drift.svg"
NAMES = {
    "fpo": "FPO", "dpo": "DPO", "simpo": "SimPO", "simpo-kl": "SimPO + KL", "tdpo1": "TDPO1",
    "tdpo2": "TDPO2",
}  # fmt: skip
WIDTH, ROW, TOP = 760, 30, 58
LEFT, RIGHT = (130, 375), (430, 675)  # from where to where each panel is drawn
PLAIN, OURS, FAINT, TEXT = "#4d5866", "#1f6fc4", "#d4d9df", "#24292f"


def methods(results: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Accuracy and KL of every seed, by method, the smallest drift first."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for cell in results["cells"]:
        if cell["group"] == "method":
            accuracies, drifts = found.setdefault(cell["name"], ([], []))
            summary = cell["summary"]
            accuracies.append(summary["rewards/accuracies"])
            drifts.append((summary["kl/chosen"] + summary["kl/rejected"]) / 2)
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(item[1][1])))


def linear(value: float) -> float:
    """Accuracy 0.5 to 1 over the left panel."""
    return LEFT[0] + (value - 0.5) / 0.5 * (LEFT[1] - LEFT[0])


def logarithmic(value: float) -> float:
    """KL 0.1 to 1000 over the right panel."""
    return RIGHT[0] + (math.log10(value) + 1) / 4 * (RIGHT[1] - RIGHT[0])


def draw(results: Mapping[str, Any]) -> str:
    """The picture as SVG."""
    rows = methods(results)
    stopped = {cell["name"] for cell in results["cells"] if cell["status"] == "diverged"}
    bottom = TOP + ROW * len(rows)
    parts = [
        text((LEFT[0] + LEFT[1]) / 2, 24, "reward accuracy, held-out pairs", "middle", bold=True)
    ]
    parts += [
        text(
            (RIGHT[0] + RIGHT[1]) / 2,
            24,
            "drift: KL from the base, nats per answer",
            "middle",
            bold=True,
        )
    ]
    for at, label in [(linear(a), f"{a:g}") for a in (0.5, 0.75, 1.0)] + [
        (logarithmic(k), f"{k:g}") for k in (0.1, 1, 10, 100, 1000)
    ]:
        parts += [line(at, TOP - 14, at, bottom, FAINT, 1), text(at, bottom + 16, label, "middle")]
    for i, (name, (accuracies, drifts)) in enumerate(rows.items()):
        y, colour = TOP + ROW * i + 6, OURS if name == "fpo" else PLAIN
        label = NAMES.get(name, name) + (", stopped" if name in stopped else "")
        parts.append(text(LEFT[0] - 14, y + 4, label, "end", bold=name == "fpo"))
        for values, place, digits in ((accuracies, linear, 2), (drifts, logarithmic, None)):
            parts += dot(values, place, y, colour, digits)
    height = bottom + 30
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13" stroke-linecap="round">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def dot(
    values: Sequence[float],
    place: Callable[[float], float],
    y: float,
    colour: str,
    digits: int | None,
) -> list[str]:
    """The range over the seeds, the mean, and the mean in digits to the right of the range."""
    mean, end = statistics.fmean(values), place(max(values))
    said = f"{mean:.{digits}f}" if digits else f"{float(f'{mean:.2g}'):g}"
    return [
        line(place(min(values)), y, end, y, colour, 3),
        f'<circle cx="{place(mean):.1f}" cy="{y}" r="5.5" fill="{colour}"/>',
        text(end + 10, y + 4, said, "start"),
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
