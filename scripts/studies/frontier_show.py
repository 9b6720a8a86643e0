"""Tables and figures of the frontier study, from the points in its work folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import intervals
import numpy as np

from fpo_mlx.storage import files

RIVAL, TWIN = "dpo", "fpo free"  # with TWIN only its kin is compared: what the constraint does
LEVELS = (2.0, 5.0, 10.0, 15.0)  # nats per answer, at which methods are compared
SHARES = (0.1, 0.3, 1.0)  # of the KL that all rates reach, where they are compared
SHOWN = (
    "reward", "kl", "unrelated_drift", "greedy_agreement", "base_nats_per_token", "tokens",
    "distinct_2", "sums", "formats",
)  # fmt: skip


def write(work: Path, to: Path) -> None:
    """to: path without its suffix; .json and .md, and .svg where matplotlib is there."""
    runs = [json.loads(p.read_text()) for p in sorted(work.glob("cells/*/points.json"))]
    if not runs:
        return
    base = json.loads((work / "base.json").read_text())
    found = lines_of(runs, base)
    compared = [row for name in found if name != RIVAL for row in against(found, name)]
    kin = [name for name in found if name.startswith("fpo") and name != TWIN]
    compared += [row for name in kin for row in against(found, name, TWIN)]
    to.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(to.with_suffix(".json"), {"base": base, "runs": runs, "compared": compared})
    files.write_text(to.with_suffix(".md"), markdown(work.name, base, runs, compared))
    with suppress(ImportError):
        draw(found, base, to.with_suffix(".svg"))


Line = list[Mapping[str, Any]]  # points of one run, by KL


def root_mean_square(values: np.ndarray, axis: int | None = None) -> Any:
    return np.sqrt(np.mean(np.square(values), axis=axis))


MEANS: dict[str, intervals.Mean] = {  # what is compared, and its mean over prompts
    "reward": np.mean, "unrelated_drift": root_mean_square, "greedy_agreement": np.mean,
}  # fmt: skip


def lines_of(
    runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any]
) -> dict[str, dict[int, Line]]:
    """Per method and seed the base and the points of its better learning rate, by KL.

    Of the rates that were run on as many seeds as any.
    """
    found = {}
    for name, rates in _by_rate(runs, base).items():
        most = max(map(len, rates.values()))
        whole = {rate: seeds for rate, seeds in rates.items() if len(seeds) == most}
        found[name] = whole[_best(whole)]
    return found


def better_rates(found: Mapping[str, Any], rates: Sequence[float]) -> dict[str, float]:
    """Of the methods that were run with all of `rates`: the best of them. found: base and runs."""
    tried = _by_rate(found["runs"], found["base"]) if found["runs"] else {}
    return {name: _best(its) for name, its in tried.items() if set(rates) <= set(its)}


def _by_rate(
    runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any]
) -> dict[str, dict[float, dict[int, Line]]]:
    """Method, rate, seed."""
    split: dict[str, dict[float, dict[int, Line]]] = {}
    prompts = _prompts(runs)
    start = {**base, "kl": 0.0, "update": 0, "part": 0.0}
    for name, of_base in (("unrelated_drift", 0.0), ("greedy_agreement", 1.0)):
        start[f"{name}/of_prompts"] = [of_base] * prompts
    for run in (run for run in runs if run["points"]):
        line = sorted([start, *(p for p in run["points"] if p["kl"] > 0)], key=_kl)
        split.setdefault(run["method"], {}).setdefault(run["rate"], {})[run["seed"]] = line
    return split


def _prompts(runs: Sequence[Mapping[str, Any]]) -> int:
    """About other things; 0 where no point has their figures."""
    points = [point for run in runs for point in run["points"]]
    return max((len(p.get("greedy_agreement/of_prompts", ())) for p in points), default=0)


def _kl(point: Mapping[str, Any]) -> float:
    return point["kl"]


def _best(rates: Mapping[float, Mapping[int, Line]]) -> float:
    """The rate of the higher mean reward on seed 0, at KLs that all of them reach."""
    tried = {rate: seeds[0] for rate, seeds in rates.items() if 0 in seeds}
    if len(tried) < 2:
        return next(iter(tried or rates))
    most = min(_kl(line[-1]) for line in tried.values())

    def reward(rate: float) -> float:
        found = [at(tried[rate], most * share) for share in SHARES]
        return float(np.mean([f.mean() for f in found if f is not None]))

    return max(tried, key=reward)


def at(line: Line, kl: float, name: str = "reward/of_prompts") -> np.ndarray | None:
    """A figure where the run has this KL, between its points by root KL; None above the last.

    The change of a small step grows with its length, the KL with the square of that.
    """
    for a, b in zip(line, line[1:], strict=False):
        if a["kl"] <= kl <= b["kl"]:
            part = (kl**0.5 - a["kl"] ** 0.5) / max(b["kl"] ** 0.5 - a["kl"] ** 0.5, 1e-9)
            first, second = (np.atleast_1d(np.array(p[name], dtype=float)) for p in (a, b))
            return first + part * (second - first)
    return None


def against(
    found: Mapping[str, Mapping[int, Line]], name: str, other: str = RIVAL
) -> list[dict[str, Any]]:
    """Reward above the other's at each of LEVELS, same seeds and prompts; 95 % bootstrap."""
    rows, rival = [], found.get(other, {})
    seeds = sorted(set(found[name]) & set(rival))
    for kl in LEVELS:
        both = [
            (found[name][seed], rival[seed])
            for seed in seeds
            if at(found[name][seed], kl) is not None and at(rival[seed], kl) is not None
        ]
        if both:
            rows.append({"method": name, "rival": other} | _gap(both, kl))
    return rows


def _gap(both: Sequence[tuple[Line, Line]], kl: float) -> dict[str, Any]:
    """Of a run and the rival's per seed; where each prompt's figure was kept, with intervals."""

    def values(name: str) -> np.ndarray:
        """[2, seeds, prompts]: ours and the rival's."""
        return np.array([[at(line, kl, name) for line in side] for side in zip(*both, strict=True)])

    found: dict[str, Any] = {"kl": kl, "seeds": len(both)}
    for name, mean in MEANS.items():
        each = f"{name}/of_prompts"
        known = all(each in point for pair in both for line in pair for point in line)
        ours, theirs = values(each if known else name)
        found[name] = float(mean(ours) - mean(theirs))
        gaps = mean(ours, axis=1) - mean(theirs, axis=1)
        found |= {f"{name}/of_seeds": gaps.tolist(), f"{name}/t": intervals.of_seeds(gaps)}
        if known:
            found[f"{name}/interval"] = intervals.drawn(ours, theirs, mean)
    return found


def markdown(
    reward: str, base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    lines = [
        f"# Reward against drift: {reward}", "",
        "Written by `scripts/studies/frontier.py`; do not edit. kl: nats per sampled answer; "
        "drift, agreement: on prompts about other things; base_nats_per_token: of the base, for "
        "the sampled answers.", "",
        f"| method | rate | seed | update | part | {' | '.join(SHOWN)} |",
        "|---|---|---|---|---|" + "---|" * len(SHOWN),
        f"| base | | | | | {' | '.join(f'{base[n]:.3f}' for n in SHOWN)} |",
    ]  # fmt: skip
    for run in runs:
        for p in run["points"]:
            figures = " | ".join(f"{p[name]:.3f}" for name in SHOWN)
            lines.append(
                f"| {run['method']} | {run['rate']:.0e} | {run['seed']} | {p['update']} | "
                f"{p['part']:g} | {figures} |"
            )
    lines += [
        "", "## At equal KL", "",
        "Above parts of the other's adapter of the same seed, where both reach the KL (between "
        "points by the root of the KL; the base is one). In brackets 95 %, by bootstrap over seeds "
        "and prompts, where each prompt's figure was kept; t: by Student's t over the seeds.", "",
        f"| method | above | KL | seeds | {' | '.join(f'{name} above' for name in MEANS)} "
        "| reward of each seed | t |",
        "|---|---|---|---|" + "---|" * len(MEANS) + "---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['method']} | {row['rival']} | {row['kl']:g} | {row['seeds']} | "
        f"{' | '.join(_above(row, name) for name in MEANS)} | "
        f"{', '.join(f'{gap:+.2f}' for gap in row['reward/of_seeds'])} | {_in_brackets(row)} |"
        for row in compared
    ]
    return "\n".join(lines) + "\n"


def _above(row: Mapping[str, Any], name: str) -> str:
    low, high = row.get(f"{name}/interval", (None, None))
    return f"{row[name]:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _in_brackets(row: Mapping[str, Any]) -> str:
    return "" if row["reward/t"] is None else "[{:+.3f}, {:+.3f}]".format(*row["reward/t"])


def draw(found: Mapping[str, Mapping[int, Line]], base: Mapping[str, Any], path: Path) -> None:
    """Reward against KL, and against what changed elsewhere; a line is the mean over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for number, (name, seeds) in enumerate(found.items()):
        colour, style = f"C{number % 10}", "-" if number < 10 else "--"
        first = next(iter(seeds.values()))
        for axis, of in zip(axes, ("kl", "unrelated_drift"), strict=True):
            for line in seeds.values():
                axis.plot(
                    [p[of] for p in line], [p["reward"] for p in line], style, color=colour,
                    marker=".", linewidth=1, label=name if line is first else "",
                )  # fmt: skip
    for axis, label in zip(axes, ("KL, nats per answer", "drift on other prompts"), strict=True):
        axis.axhline(base["reward"], color="grey", linewidth=0.7)
        axis.set(xscale="symlog" if label.startswith("KL") else "linear", xlabel=label)
    axes[0].set_ylabel("reward")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
