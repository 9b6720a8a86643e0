"""Curves as small inline SVG: matplotlib draws, the page's style sheet colours.

Every colour in the drawing is a placeholder that becomes a CSS variable, so that the same lines
are readable on a light and on a dark page. Text stays text; nothing points outside the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.report.read import Run, figure

COLOURS = 8  # series colours of the style sheet; more runs begin again
POINTS = 300  # of a line; more are averaged
INK, FAINT = "#010203", "#010204"  # placeholders
SERIES = [f"#0101{16 + i:02x}" for i in range(COLOURS)]
WIDTH, HEIGHT = 4.6, 2.6  # inches, of 72 points
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "fpo-mlx", "font.size": 10.5,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.linewidth": 0.8, "lines.linewidth": 1.8,
    "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One plot: lines of a run share its colour; the second of two is dashed."""

    title: str
    note: str
    keys: tuple[str, ...]
    log: bool = False  # a logarithmic axis where the values span more than two decades


LOSS = (
    "mean over the pairs since the last report, with the constraint's part; dots: validation, "
    "without it"
)
CURVES = (
    Curve("Loss", LOSS, ("loss",)),
    Curve("Reward accuracy", "share of pairs with chosen ahead", ("rewards/accuracies",)),
    Curve("Reward margin", "chosen reward minus rejected reward", ("rewards/margins",)),
    Curve(
        "Log-prob against the reference", "nats a token; solid chosen, dashed rejected",
        ("logps_per_token/chosen_change", "logps_per_token/rejected_change"),
    ),
    Curve(
        "Feature distance D", "solid chosen, dashed rejected",
        ("features/chosen", "features/rejected"), log=True,
    ),
    Curve("KL to the reference", "nats; solid chosen, dashed rejected",
          ("kl/chosen", "kl/rejected"), log=True),
    Curve("Gradient norm", "before clipping", ("grad_norm",), log=True),
    Curve("Tokens a second", "a prompt counts once a pair", ("tokens_per_second",)),
    Curve("Peak memory", "GB, since the start", ("peak_memory_gb",)),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int  # which series
    dashed: bool = False
    dots: bool = False  # validation


@dataclass(frozen=True)
class Plot:
    """A drawn curve. svg: safe markup, made here and of numbers only."""

    title: str
    note: str
    summary: str  # the same in words, for those who do not see it
    svg: str


def value_of(report: Mapping[str, Any], key: str) -> float | None:
    """A figure of a line of metrics.jsonl, whether it stands at the top or under `metrics`."""
    metrics = report.get("metrics")
    inner = metrics.get(key) if isinstance(metrics, Mapping) else None
    return figure(report.get(key, inner))


def points(reports: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(iterations, values), finite ones only; bins of neighbours are averaged to `POINTS`."""
    pairs = [(figure(r.get("iteration")), value_of(r, key)) for r in reports]
    good = [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]
    size = -(-len(good) // POINTS) if good else 1
    bins = [good[i : i + size] for i in range(0, len(good), size)]
    return tuple([sum(p[k] for p in b) / len(b) for b in bins] for k in (0, 1))  # type: ignore


def draw_all(runs: Sequence[Run]) -> list[Plot]:
    """A plot for every curve that at least one run has. Raises ImportError without matplotlib."""
    drawn = []
    for number, curve in enumerate(CURVES):
        lines = lines_of(curve, runs)
        if lines:
            svg = draw(lines, curve.log, prefix=f"c{number}")
            drawn.append(Plot(curve.title, curve.note, in_words(curve, runs), svg))
    return drawn


def lines_of(curve: Curve, runs: Sequence[Run]) -> list[Line]:
    out = []
    for colour, run in enumerate(runs):
        for reports, dots in ((run.train, False), (run.valid, True)):
            for i, key in enumerate(curve.keys):
                x, y = points(reports, key)
                if x and not (dots and i):  # validation: the chosen side only
                    out.append(Line(tuple(x), tuple(y), colour, dashed=i > 0, dots=dots))
    return out


def in_words(curve: Curve, runs: Sequence[Run]) -> str:
    """First and last value of each line."""
    said = []
    for run in runs:
        for key in curve.keys:
            _, y = points(run.train, key)
            if y:
                side = f" {key.split('/')[1].split('_')[0]}" if len(curve.keys) > 1 else ""
                said.append(f"{run.name}{side} from {y[0]:.4g} to {y[-1]:.4g}")
    return f"{curve.title} by iteration: " + ("; ".join(said) or "validation only")


def draw(lines: Sequence[Line], log: bool, *, prefix: str) -> str:
    """Lines -> SVG markup. prefix: of its ids, so that they meet no other plot's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = fig.subplots()
        axes.patch.set_visible(False)
        fig.patch.set_visible(False)
        axes.grid(axis="y")
        axes.tick_params(which="both", length=0)
        axes.locator_params(axis="x", nbins=6)
        for line in lines:
            lone = len(line.x) == 1
            axes.plot(
                line.x, line.y, color=SERIES[line.colour % COLOURS],
                linestyle="none" if line.dots or lone else (0, (4, 2)) if line.dashed else "-",
                marker="o" if line.dots or lone else None, markersize=4,
            )  # fmt: skip
        if log and _spans(lines):
            axes.set_yscale("log", nonpositive="mask")
        axes.set_xlabel("iteration")
        out = io.StringIO()
        fig.savefig(out, format="svg", metadata={"Date": None})
    return tidy(out.getvalue(), prefix)


def _spans(lines: Sequence[Line]) -> bool:
    """Whether a logarithmic axis serves. A zero is no value there: D before the first update."""
    values = [y for line in lines for y in line.y]
    above = [y for y in values if y > 0]
    return min(values) >= 0 and bool(above) and max(above) / min(above) > 100


def tidy(svg: str, prefix: str) -> str:
    """What stays of matplotlib's file: the drawing, scaled by the page and coloured by it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would reach the whole page
    svg = re.sub(r' transform="rotate\(-0[^"]*"|font-family: [^;"]*;? ?', "", svg)
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    # coordinates, not the numbers at the ticks
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    return svg.strip()
