"""What control_margin.py measured, compared: of each family rates, gaps, margins; the figure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import intervals
import numpy as np
from texts import Steps

from fpo_mlx.storage import files

FREE, BASE = "fpo", "base"
FAMILIES = {  # what is compared at one margin; unrelated features may slow learning more
    "held": (FREE, "held", "held, unrelated"),
    "held alone": (FREE, "held"),
    "out": (FREE, "out", "out, unrelated"),
}


def write(measured: Steps) -> None:
    """The comparison, from all points that are there."""
    found = measured.values().values()
    nats = {_of(one): one["base_nats"] for one in found if "base_nats" in one}
    points = [
        one | {"answers": one["answers"] | {"base_nats": nats.get(_of(one))}}
        for one in found
        if "rates" in one
    ]
    levels = sorted({point["level"] for point in points if point["kind"] != BASE})
    result = {
        f"{way} at {level:g}": found
        for way, level in itertools.product(FAMILIES, levels)
        if (found := compared(points, way, level))
    }
    files.write_json(measured.folder.parent / "compared.json", result)
    print(json.dumps(result, indent=2), flush=True)
    with suppress(ImportError):
        draw(result, measured.folder.parent / "rates.svg")


def _of(found: Mapping[str, Any]) -> tuple[Any, ...]:
    return found["way"], found["kind"], found["seed"], found["level"]


def compared(points: Sequence[Mapping[str, Any]], way: str, level: float) -> dict[str, Any]:
    """Of the seeds that have all kinds of a family: rates, gaps, margins, each with its 95 %."""
    kinds, own = FAMILIES[way], [p for p in points if (p["way"], p["level"]) == (way, level)]
    found = {(p["kind"], p["seed"]): p for p in own}
    seeds = sorted({s for _, s in found if all((kind, s) in found for kind in kinds)})
    if not seeds:
        return {}

    def of(kind: str, figure: Callable[[Mapping[str, Any]], Any]) -> np.ndarray:
        return np.array([figure(found[kind, s]) for s in seeds])

    rates = {kind: of(kind, itemgetter("rates")) for kind in kinds}
    begun = {p["seed"]: p for p in points if p["kind"] == BASE}
    pairs = list(itertools.combinations(kinds, 2))
    if all(s in begun for s in seeds):
        rates[BASE] = np.array([begun[s]["rates"] for s in seeds])
        pairs += [(kind, BASE) for kind in kinds]
    gained = {kind: of(kind, itemgetter("sides")) for kind in kinds}  # [seeds, pairs, 2]
    margins = {kind: one[..., 0] - one[..., 1] for kind, one in gained.items()}
    return {
        "seeds": len(seeds),
        "parts": {kind: of(kind, itemgetter("part")).tolist() for kind in kinds},
        "margins": {kind: one.mean(axis=1).tolist() for kind, one in margins.items()},
        "chosen gained": {kind: one[..., 0].mean(axis=1).tolist() for kind, one in gained.items()},
        "margins less fpo's": {
            kind: intervals.gap(margins[kind], margins[FREE]) for kind in kinds if kind != FREE
        },
        "answers": {kind: [found[kind, s]["answers"] for s in seeds] for kind in kinds}
        | ({BASE: [begun[s]["answers"] for s in seeds]} if BASE in rates else {}),
        "rates": {kind: intervals.gap(one, 0 * one) for kind, one in rates.items()},
        "gaps": {f"{a} less {b}": intervals.gap(rates[a], rates[b]) for a, b in pairs},
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Rate of the behaviour against the margin, a line for each kind from the base on."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "control"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FAMILIES), figsize=(11, 4.5), sharey=True)
    for (way, kinds), axis in zip(FAMILIES.items(), axes, strict=True):
        there = [
            f for name, f in result.items() if name.startswith(f"{way} at ") and BASE in f["rates"]
        ]
        for kind in kinds if there else ():
            line = [(0.0, there[0]["rates"][BASE])]
            line += [(np.mean(found["margins"][kind]), found["rates"][kind]) for found in there]
            low, high = ([abs(rate["mean"] - rate["drawn"][i]) for _, rate in line] for i in (0, 1))
            axis.errorbar(
                [m for m, _ in line], [rate["mean"] for _, rate in line], yerr=[low, high],
                label=kind, capsize=3, linewidth=1,
            )  # fmt: skip
        axis.set(xlabel="margin on held-out pairs, nats per token", title=way)
        if there:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("answers that show it")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
