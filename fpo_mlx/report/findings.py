"""What a reader must be told: warnings of the run, of its figures, and parts that are missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.config import Objective, advice
from fpo_mlx.errors import FpoError
from fpo_mlx.records import COLLAPSE, FEWEST
from fpo_mlx.report.commands import command
from fpo_mlx.report.plots import value_of
from fpo_mlx.report.read import Run, figure, on_training
from fpo_mlx.report.tables import (
    chosen_drop,
    defaults,
    judged,
    judged_less,
    judged_on,
    last_seen,
    number,
    part_judged,
    summary_of,
    text,
)

LENGTH_GAP = 0.15  # of accuracy between pairs whose chosen is longer and the others
OFF_TARGET = 0.1  # of a target: a drift within that is one that was reached
OFF_BY_FEW = 0.5  # the same, seen by fewer validation pairs than a landing takes, or in training
FEW = 9.5  # pairs; share * n is 10 to rounding


@dataclass(frozen=True)
class Warning:
    run: str  # empty: about all of them
    text: str


@dataclass(frozen=True)
class Missing:
    run: str
    what: str
    command: str


def warnings(runs: Sequence[Run]) -> list[Warning]:
    found = [Warning(run.name, said) for run in runs for said in _of_one(run)]
    return found + [Warning("", said) for said in _between(runs)]


def _of_one(run: Run) -> Iterator[str]:
    yield from run.faults
    for report in (*run.train, *run.valid):
        said = report.get("warnings")
        for warning in said if isinstance(said, Sequence) and not isinstance(said, str) else ():
            yield f"Iteration {text(report.get('iteration'))}: {text(warning)}"
    if any(_not_finite(report["loss"]) for report in run.train if "loss" in report):
        yield "The loss was not finite at some report."
    if run.skipped:
        first = run.skipped[0]
        yield (
            f"Updates left out: {len(run.skipped)}; the first at iteration "
            f"{text(first.get('iteration'))}: {text(first.get('reason'))}."
        )
    yield from _unfinished(run)
    yield from _landed(run)
    yield from missed(run)
    yield from collapse(run)
    yield from _length(run)
    yield from _judged_otherwise(run)
    for kind, result in run.results.items():
        if result.stale:
            yield f"{result.path.name} ({kind}) is older than the adapters: run it again."


def _judged_otherwise(run: Run) -> Iterator[str]:
    """The evaluation is not of the whole adapter on pairs that it did not see."""
    if on_training(judged(run)):
        yield (
            f"{run.results['evaluate'].path.name} is of training pairs, which say little of "
            "others: evaluate on held-out ones."
        )
    if scale := part_judged(run):
        yield (
            f"{run.results['evaluate'].path.name} is of the adapter{scale}, a part of its change: "
            "evaluate it without --adapter-scale."
        )


def _not_finite(loss: Any) -> bool:
    """Also of null, which stands for it in a log."""
    number = math.nan if loss is None else figure(loss)
    return number is not None and not math.isfinite(number)


def _unfinished(run: Run) -> Iterator[str]:
    planned = figure(run.record.get("iterations")) or figure(run.settings.get("iters"))
    done = figure(run.train[-1].get("iteration")) if run.train else None
    if planned and done and done < planned:
        may = " (--early-stopping may have ended it)" if run.settings.get("early_stopping") else ""
        yield f"The last report is of iteration {number(done)} of {number(planned)}{may}."


def _landed(run: Run) -> Iterator[str]:
    """The curves are of another model than the one that was saved."""
    if said := saved_part(run):
        yield f"{said}. The curves are of the whole change."


def saved_part(run: Run) -> str:
    """Which part of the change was saved at the end, for the target; empty where all of it was."""
    part, before, after, target = (
        figure(run.end.get(name)) for name in ("part", "before", "after", "target")
    )
    if part is None or before is None or after is None or target is None:
        return ""
    kl = run.end.get("figure") == "kl"
    what, unit = ("the KL is", " nats an answer") if kl else ("features move by", " of their size")
    return (
        f"Saved is {number(part, 3)} of the change that was trained: on "
        f"{text(run.end.get('pairs'))} validation pairs {what} {number(after, 3)}{unit}, wanted "
        f"{number(target, 3)}; with the whole change {number(before, 3)}"
    )


def missed(run: Run) -> Iterator[str]:
    """That what was saved moved by more or less than --target-drift or --target-kl named."""
    last = last_seen(run)
    held_out = last.get("kind") != "train"
    sure = held_out and (figure(last.get("pairs")) or 0) >= FEWEST
    pairs = f"{text(last.get('pairs'))} validation" if held_out else "the last report's training"
    for name, figure_of in (("drift", "drift/rejected"), ("kl", "kl/rejected")):
        target, seen = figure(run.settings.get(f"target_{name}")), value_of(last, figure_of)
        if not target or target < 0 or seen is None or not 0 < seen < math.inf:
            continue
        moved = math.sqrt(seen) if name == "drift" else seen
        if abs(moved / target - 1) <= (OFF_TARGET if sure else OFF_BY_FEW):
            continue
        what, unit = ("it is", "nats") if name == "kl" else ("features move by", "of their size")
        yield (
            f"--target-{name} {number(target)} was not reached: on {pairs} pairs {what} "
            f"{number(moved, 3)} {unit}, "
            f"{number(moved / target, 2)} times as far. {_nearer(run, name, moved > target)}."
        )


def _nearer(run: Run, name: str, too_far: bool) -> str:
    """What helps against a target that was missed."""
    rate = advice.rate_of(run.settings.get("lr_schedule"))
    if not too_far:
        return f"Train longer (--resume with more --iters), or raise {rate}"
    if run.settings.get("init_adapter"):
        return f"Lower {rate}, or train for less long"
    return f"`fpo-mlx fuse --target-{name}` takes the part of the change within it; or lower {rate}"


def collapse(run: Run) -> Iterator[str]:
    """That the chosen answers lost so much that the other figures mean nothing.

    What helps is said once: where the run itself warned, the place is named.
    """
    lost = chosen_drop(run)
    if not lost > COLLAPSE:
        return
    if warned := _warned(run):
        yield (
            f"The chosen answers have lost {number(lost, 3)} nats a token at the end; what helps "
            f"is said at iteration {warned}."
        )
        return
    said = advice.fallen(lost, _objective(run), advice.rate_of(run.settings.get("lr_schedule")))
    yield f"{said[0].upper()}{said[1:]}."


def _warned(run: Run) -> str:
    """The iteration of the report that warned of it; empty where none did."""
    for report in (*run.valid, *run.train):
        said = report.get("warnings")
        if isinstance(said, list) and any(str(one).startswith(advice.FALLEN) for one in said):
            return text(report.get("iteration"))
    return ""


def _objective(run: Run) -> Objective:
    """As far as what helps depends on it; the default's where the record is damaged."""
    given = {**defaults(run), **run.settings}
    names = ("nll_weight", "link", "preference_weight", "beta", "length_normalize")
    try:
        return Objective(**{name: given[name] for name in names})
    except (FpoError, KeyError, TypeError, ValueError):
        return Objective()


def _length(run: Run) -> Iterator[str]:
    summary = summary_of(run)
    longer, other = (
        figure(summary.get(f"rewards/accuracies/{k}"))
        for k in ("chosen_longer", "chosen_not_longer")
    )
    share, n = figure(summary.get("share_chosen_longer")), figure(summary.get("n"))
    if share is not None and n is not None and n * min(share, 1 - share) < FEW:
        return  # of so few pairs a share says nothing
    if longer is not None and other is not None and abs(longer - other) > LENGTH_GAP:
        yield (
            f"Accuracy is {number(longer, 3)} where the chosen answer is the longer one and "
            f"{number(other, 3)} elsewhere: part of what was learned may be length."
        )


def _between(runs: Sequence[Run]) -> Iterator[str]:
    """What makes several runs hard to compare."""
    for name, why in (
        ("model", "No figure can be compared."),
        ("data", "They were trained on different pairs."),
        ("tokenizer", "Token counts and log-probs may differ for that alone."),
        ("saes", "D is measured in different features, so D cannot be compared."),
    ):
        seen = {text(run.fingerprints[name]) for run in runs if name in run.fingerprints}
        if len(seen) > 1:
            yield f"The runs differ in {name} (see the fingerprints). {why}"
    pairs = {n for run in runs if (n := figure(summary_of(run).get("n"))) is not None}
    splits = {judged_on(run) for run in runs if "split" in judged(run)}
    if len(splits) > 1:
        yield f"The evaluations are over different pairs: {', '.join(sorted(splits))}."
    if len(pairs) > 1:
        yield f"The evaluations are over {', '.join(map(number, sorted(pairs)))} pairs."


def missing(runs: Sequence[Run]) -> list[Missing]:
    """Parts that a report can show, and the command that makes each."""
    return [m for run in runs for m in _missing(run)]


def _missing(run: Run) -> Iterator[Missing]:
    if not run.record:
        yield Missing(run.name, "run.json (settings, fingerprints)", "fpo-mlx train …")
    if not run.train:
        yield Missing(run.name, "metrics.jsonl (curves)", "fpo-mlx train …")
    for kind, what in (
        ("evaluate", "held-out figures"),
        ("features", "feature changes"),
        ("compare", "sample answers"),
    ):
        if kind in run.results and not (kind == "evaluate" and judged_less(run)):
            continue
        if kind == "features" and not run.settings.get("sae"):
            continue
        yield Missing(run.name, what, command(run, kind))
