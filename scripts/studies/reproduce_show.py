"""results.json, results.md and four figures from the kept cells of reproduce.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_mlx.records import COLLAPSE
from fpo_mlx.storage.files import atomic_path, write_json, write_text

Records = Sequence[Mapping[str, Any]]
POINTS = 0.02  # of accuracy: "within 2 points of the best"
COLUMNS = (  # heading, key of the summary, digits
    ("accuracy", "rewards/accuracies", 3),
    ("policy accuracy", "policy_accuracy", 3),
    ("margin", "rewards/margins", 3),
    ("chosen, nats/token", "logps_per_token/chosen_change", 3),
    ("KL chosen", "kl/chosen", 3),
    ("KL rejected", "kl/rejected", 3),
    ("KL margin", "kl/margin", 3),
    ("D chosen", "features/chosen", 3),
    ("D rejected", "features/rejected", 3),
    ("D margin", "features/margin", 3),
    ("entropy", "answers/entropy", 3),
    ("distinct-2", "answers/distinct_2", 3),
    ("s/pair", "seconds_per_pair", 3),
    ("peak GB", "peak_memory_gb", 3),
)
JUDGED = ("rewards/accuracies", "kl/margin", "features/rejected")  # what the claims are about
COLOURS = ("#1f6fc4", "#c2500a", "#0b7f5c", "#a0318f", "#7a6400", "#5a50c8", "#4d5866")


def write(
    output: Path, facts: Mapping[str, Any], records: Records, left: Sequence[str], draw: bool
) -> None:
    write_json(output / "results.json", {"setup": facts, "cells": list(records), "left": left})
    write_text(output / "results.md", markdown(facts, records, left))
    if draw and any(r["group"] == "method" for r in records):
        figures(output, records)


def value(record: Mapping[str, Any], key: str) -> float | None:
    """A figure of one cell, of its summary or of its training."""
    found = record["summary"].get(key, (record["training"] or {}).get(key))
    return float(found) if isinstance(found, int | float) else None


def values(records: Records, name: str, key: str) -> list[float]:
    """Of every seed that has it."""
    return [v for r in records if r["name"] == name and (v := value(r, key)) is not None]


def mean(records: Records, name: str, key: str) -> float | None:
    found = values(records, name, key)
    return statistics.fmean(found) if found else None


def names(records: Records, *groups: str) -> list[str]:
    return list(dict.fromkeys(r["name"] for r in records if r["group"] in groups))


def cell(records: Records, name: str, key: str, digits: int) -> str:
    """The mean over the seeds with half their range; of one seed with the interval over pairs."""
    found = values(records, name, key)
    if not found or (name == "base" and key.startswith(("rewards/", "logps_per_token/"))):
        return "–"  # the base's rewards are 0 by definition
    text = f"{statistics.fmean(found):.{digits}g}"
    if len(found) > 1:
        return f"{text} ± {(max(found) - min(found)) / 2:.2g}"
    (record,) = (r for r in records if r["name"] == name and value(r, key) is not None)
    ends = record["summary"].get(f"{key}/ci95") if key in JUDGED and name != "base" else None
    return f"{text} [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else text


def markdown(facts: Mapping[str, Any], records: Records, left: Sequence[str]) -> str:
    lines = [
        "# The paper in small",
        "",
        "Written by `scripts/studies/reproduce.py`; do not edit.",
        "",
    ]
    lines += [f"- {key}: {said}" for key, said in facts.items()]
    lines += [f"- cells that are still to be run: {len(left)}"] if left else []
    lines += [
        "",
        "Means over the seeds, ± half their range; of one seed the accuracy, the KL margin and D",
        "of the rejected with a 95 % interval over pairs. KL in nats an answer, D with the first",
        "SAE, entropy of sampled answers in nats a token. KL and D margins: rejected minus chosen.",
        "",
    ]
    for title, groups in (("Methods", ("base", "method")), ("Ablations of FPO", ("ablation",))):
        shown = names(records, *groups)
        if not shown:
            continue
        of = ablated(records) if groups == ("ablation",) else records
        shown += ["fpo"] if of is not records and values(of, "fpo", "n") else []
        lines += [f"## {title}", "", *table(of, shown), ""]
    lines += ["## Reading", "", *(f"- {said}" for said in reading(records)), ""]
    return "\n".join(lines)


def ablated(records: Records) -> Records:
    """The ablations, and FPO itself on their seeds alone: other seeds are no fair comparison."""
    seeds = {r["seed"] for r in records if r["group"] == "ablation"}
    return [r for r in records if r["group"] == "ablation" or r["seed"] in seeds]


def table(records: Records, shown: Sequence[str]) -> list[str]:
    kept = [c for c in COLUMNS if any(values(records, name, c[1]) for name in shown)]
    head = ["", "seeds", *(title for title, _, _ in kept)]
    rows = [
        [label(records, name), str(len(values(records, name, "n")))]
        + [cell(records, name, key, digits) for _, key, digits in kept]
        for name in shown
    ]
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def label(records: Records, name: str) -> str:
    """The name, and what became of its runs where that is not plain."""
    mine = [r for r in records if r["name"] == name]
    ended = sum(r["status"] == "diverged" for r in mine)
    note = f" (stopped as diverging: {ended} of {len(mine)})" if ended else ""
    lost = mean(records, name, "logps_per_token/chosen_change")
    return f"{name}{note}" + (" (collapsed)" if lost is not None and lost < -COLLAPSE else "")


def reading(records: Records) -> list[str]:
    """What the paper says, and whether these figures say the same."""
    found = [accuracy_claim(records)]
    for what, key in (
        ("KL margin (size)", "kl/margin"),
        ("D of the rejected", "features/rejected"),
    ):
        for other in ("dpo", "simpo"):
            found.append(below_claim(records, what, key, other))
    found.append(cost_claim(records))
    found.append(stop_gradient_claim(records))
    return [text for text in found if text] or ["Not enough cells yet."]


def accuracy_claim(records: Records) -> str:
    ours = mean(records, "fpo", "rewards/accuracies")
    all_of = {n: mean(records, n, "rewards/accuracies") for n in names(records, "method")}
    known = {n: a for n, a in all_of.items() if a is not None}
    if ours is None or len(known) < 2:
        return ""
    best = max(known, key=lambda n: known[n])
    holds = known[best] - ours <= POINTS + 1e-9
    return (
        f"FPO's accuracy within 2 points of the best: {verdict(holds)}. "
        f"fpo {ours:.3f}, best {best} {known[best]:.3f}."
    )


def below_claim(records: Records, what: str, key: str, other: str) -> str:
    ours, theirs = mean(records, "fpo", key), mean(records, other, key)
    if ours is None or theirs is None:
        return ""
    holds = abs(ours) < abs(theirs)
    return f"FPO's {what} below {other}'s: {verdict(holds)}. fpo {ours:.4g}, {other} {theirs:.4g}."


def cost_claim(records: Records) -> str:
    parts = []
    for key, unit in (("peak_memory_gb", "GB"), ("seconds_per_pair", "s per pair")):
        said = [
            f"{n} {v:.3g}" for n in ("simpo", "fpo", "tdpo2")
            if (v := mean(records, n, key)) is not None
        ]  # fmt: skip
        parts += [", ".join(said) + f" {unit}"] if len(said) > 1 else []
    return (
        "Cost beside a method without and one with a reference in training: "
        + "; ".join(parts)
        + "."
        if parts
        else ""
    )


def stop_gradient_claim(records: Records) -> str:
    with_, without = (
        mean(ablated(records), n, "rewards/accuracies") for n in ("fpo", "fpo no stop-gradient")
    )
    if with_ is None or without is None:
        return ""
    return (
        f"The stop-gradient does not cost accuracy: {verdict(with_ >= without - POINTS)}. "
        f"With {with_:.3f}, without {without:.3f}."
    )


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def figures(output: Path, records: Records) -> None:
    """Four SVG files: trade-off, distances, alpha, cost."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "fpo-mlx", "font.size": 10,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    drawings = {
        "tradeoff": (trade_off, 1), "distances": (distances, 2), "alpha": (alpha, 3),
        "cost": (cost, 2),
    }  # fmt: skip
    with matplotlib.rc_context(style):
        for name, (draw, panels) in drawings.items():
            figure = Figure(figsize=(3.4 * panels + 2.2 * (panels == 1), 3.4), layout="constrained")
            draw(figure.subplots(1, panels), records)
            with atomic_path(output / f"{name}.svg") as path:
                figure.savefig(path, format="svg", metadata={"Date": None})


def trade_off(axes: Any, records: Records) -> None:
    """Each seed a dot: further left and up is better."""
    for colour, name in zip(COLOURS, names(records, "method"), strict=False):
        kl = [abs(v) for v in values(records, name, "kl/margin")]
        accuracy = values(records, name, "rewards/accuracies")
        axes.plot(kl, accuracy[: len(kl)], "o", color=colour, label=name)
    if any(line.get_xdata().size for line in axes.lines):
        axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("size of the KL margin, nats")
    axes.set_ylabel("reward accuracy, held out")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def distances(axes: Any, records: Records) -> None:
    shown = names(records, "method")
    for panel, (title, key) in zip(axes, (("D", "features"), ("KL, nats", "kl")), strict=True):
        for offset, side, colour in ((-0.2, "chosen", COLOURS[0]), (0.2, "rejected", COLOURS[1])):
            heights = [mean(records, n, f"{key}/{side}") or 0.0 for n in shown]
            at = [i + offset for i in range(len(shown))]
            panel.bar(at, heights, 0.38, color=colour, label=side)
        panel.set_xticks(range(len(shown)), shown, rotation=30)
        panel.set_yscale("symlog", linthresh=0.1)
        panel.margins(y=0.15)
        panel.set_title(title, fontsize=10)
    axes[0].legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


def alpha(axes: Any, records: Records) -> None:
    """What holding tighter costs; alpha 0 is FPO without its constraint."""
    at = {"fpo no constraint": 0.0, "fpo": 0.5}
    at |= {n: float(n.split()[-1]) for n in names(records, "ablation") if n.startswith("fpo alpha")}
    order, of = sorted((a, n) for n, a in at.items()), ablated(records)
    for panel, (title, key) in zip(
        axes,
        (("accuracy", "rewards/accuracies"), ("D, rejected", "features/rejected"),
         ("KL margin, nats", "kl/margin")),
        strict=True,
    ):  # fmt: skip
        known = [(a, v) for a, n in order if (v := mean(of, n, key)) is not None]
        panel.plot([a for a, _ in known], [v for _, v in known], "o-", color=COLOURS[0])
        if key != "rewards/accuracies":  # without the constraint it is another order
            panel.set_yscale("symlog", linthresh=0.1)
        panel.set_xlabel("alpha")
        panel.set_title(title, fontsize=10)


def cost(axes: Any, records: Records) -> None:
    shown = names(records, "method")
    for panel, (title, key) in zip(
        axes,
        (("peak memory, GB", "peak_memory_gb"), ("seconds per pair", "seconds_per_pair")),
        strict=True,
    ):
        panel.bar(shown, [mean(records, n, key) or 0.0 for n in shown], color=COLOURS[2])
        panel.set_xticks(range(len(shown)), shown, rotation=30)
        panel.set_title(title, fontsize=10)
