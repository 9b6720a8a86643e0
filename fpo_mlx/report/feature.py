"""One feature -> an HTML page in the report's style: no script, no request, every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fpo_mlx import __version__
from fpo_mlx.report.page import environment
from fpo_mlx.report.tables import Table

WIDTH, HEIGHT = 320, 120  # of the histogram's drawing
FIGURES = {
    "density": "Active, share of the positions",
    "texts": "Active, share of the answers",
    "mean_active": "Mean activation where active",
    "largest": "Largest activation",
    "chosen": "Mean on chosen answers",
    "rejected": "Mean on rejected answers",
}


def render_feature(page: Mapping[str, Any]) -> str:
    """page: what `features show --json` writes. Raises: ConfigError without jinja2."""
    sides = [page["before"], *([page["after"]] if page["after"] else [])]
    head = ["", *(("Before", "After") if page["after"] else ("On this split",))]
    rows = [[name, *(f"{side[key]:.4g}" for side in sides)] for key, name in FIGURES.items()]
    return environment().get_template("feature.html").render(
        page=page,
        version=__version__,
        figures=Table(f"{page['pairs']} pairs of {page['split']}", head, rows),
        bars=[_bars(side["counts"], sides) for side in sides],
        top=f"{page['before']['top']:.3g}",
        tokens=_tokens(page["promoted"], page["suppressed"]),
        similar=_similar(page["similar"]),
        contexts=[_context(one) for one in page["contexts"]],
    )  # fmt: skip


def _similar(found: Sequence[tuple[int, float, str]]) -> Table:
    """With a column of labels where any of them has one."""
    shown = 3 if any(label for _, _, label in found) else 2
    rows = [[str(i), f"{cosine:.3f}", label][:shown] for i, cosine, label in found]
    head = ["Feature", "Cosine", "Label"][:shown]
    return Table("Decoder rows that point the same way", head, rows)


def _bars(counts: Sequence[int], sides: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Rectangles of a histogram; one scale for both models."""
    most = max((max(side["counts"]) for side in sides), default=0) or 1
    step = WIDTH / len(counts)
    return [
        {"x": round(step * i, 2), "width": round(step - 1, 2), "count": int(count),
         "y": round(HEIGHT * (1 - count / most), 2), "height": round(HEIGHT * count / most, 2)}
        for i, count in enumerate(counts)
    ]  # fmt: skip


def _tokens(up: Sequence[Any], down: Sequence[Any]) -> Table | None:
    if not up:
        return None
    rows = [
        [repr(a), f"{x:+.3g}", repr(b), f"{y:+.3g}"]
        for (a, x), (b, y) in zip(up, down, strict=True)
    ]
    return Table("On the direct path to the logits", ["Promoted", "", "Suppressed", ""], rows)


def _context(one: Mapping[str, Any]) -> dict[str, str]:
    """The text in three parts, cut at the token's own place: texts may hold « and » themselves."""
    token = str(one["token"])
    before, mark, after = str(one["text"]).partition(f"«{token}»")
    return {
        "before": before, "token": token if mark else "", "after": after, "where": one["where"],
        "activation": f"{one['activation']:.4g}",
    }  # fmt: skip
