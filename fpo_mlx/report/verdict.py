"""What a run's own validations say of it, for a reader to whom it is the first one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fpo_mlx.intervals import wilson
from fpo_mlx.report import findings
from fpo_mlx.report.commands import HELD_OUT, command, model_words, of_others, overwritten
from fpo_mlx.report.read import Run, figure, part
from fpo_mlx.report.tables import number, text
from fpo_mlx.storage.adapter_files import WEIGHTS

CHANGE = "logps_per_token/{}_change"
HELD = "Hold some back (--valid-share 0.05) and train again, or evaluate on pairs of your own."


def verdict(run: Run) -> list[str]:
    """Lines for the end of a training: what was measured, what to beware of, what comes next."""
    own = replace(run, results={})  # they are of adapters before, or say no more than the run
    lines = [*held_out(run), *(f"warning: {said}" for said in findings.collapse(own))]
    other = f" ({HELD_OUT} is your file of other pairs)" if of_others(run) else ""
    return [*lines, f"Next{other}:", *(f"  {command}" for command in commands(run))]


def held_out(run: Run) -> list[str]:
    """What the validations measured, before and after; or that there were none."""
    if not run.valid:
        return list(_without(run))
    first, last = _first(run), run.end or run.valid[-1]
    before, after = part(first, "metrics"), part(last, "metrics")
    n = figure(last.get("pairs")) or 0.0
    when = f"after {text(last.get('iteration'))} iterations"
    head = f"On {number(n)} held-out pairs {'before -> ' if before else ''}{when}:"
    lines = (
        _accuracy(run, after, n),
        _pair("chosen answer is the likelier one", before, after, "policy_accuracy"),
        _pair("reward margin", before, after, "rewards/margins"),
        _answers(after),
        _moved(after),
        _best(run),
    )
    return [head, *(f"  {line}" for line in lines if line)]


def _without(run: Run) -> Iterator[str]:
    yield (
        "No pair was held out: whether the model learned more than its own training pairs, this "
        f"run cannot say. {HELD}"
    )
    if not run.train:
        return
    metrics = part(run.train[-1], "metrics")
    yield f"On training pairs, at iteration {text(run.train[-1].get('iteration'))}:"
    share = figure(metrics.get("rewards/accuracies"))
    if share is not None:
        yield f"  accuracy {number(share, 3)}: {_right(run)}; trained on, so high by itself"
    yield from (f"  {line}" for line in (_answers(metrics), _moved(metrics)) if line)


def _first(run: Run) -> Mapping[str, Any]:
    """The validation before the first update; empty where it is of other pairs, or not there."""
    first, last = run.valid[0], run.end or run.valid[-1]
    same = first.get("iteration") == 0 and first.get("pairs") == last.get("pairs")
    return first if same and first.get("iteration") != last.get("iteration") else {}


def _right(run: Run) -> str:
    """What a pair that counts as right is."""
    if run.settings.get("margin", "reference") == "reference":
        return "share of pairs whose chosen answer gained more than the rejected one"
    return "share of pairs whose chosen answer has the higher reward"


def _accuracy(run: Run, metrics: Mapping[str, Any], n: float) -> str:
    """With an interval, and with what so few pairs cannot tell."""
    share = figure(metrics.get("rewards/accuracies"))
    if share is None or not math.isfinite(share) or n < 1:
        return ""
    low, high = wilson(share, n)
    line = (
        f"accuracy {number(share, 3)} ({number(low, 2)} to {number(high, 2)} with 95 % "
        f"confidence): {_right(run)}; "
    )
    if high < 0.5:
        return line + "worse than chance (0.5)"
    if low <= 0.5:
        return line + "so few pairs cannot tell that from chance (0.5)"
    return line + "chance is 0.5"


def _pair(name: str, before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """ "margin 0 -> 0.04", or the end alone."""
    then, now = figure(before.get(key)), figure(after.get(key))
    if now is None:
        return ""
    return f"{name}: {'' if then is None else f'{number(then, 3)} -> '}{number(now, 3)}"


def _answers(metrics: Mapping[str, Any]) -> str:
    """What chosen and rejected answers gained or lost, in nats and in plain words."""
    chosen, rejected = (figure(metrics.get(CHANGE.format(s))) for s in ("chosen", "rejected"))
    if chosen is None or not math.isfinite(chosen):
        return ""
    plain = f"a token is {math.exp(min(chosen, 50.0)):.2g} times as likely as before"
    line = f"chosen answers {_signed(chosen)} nats/token: {plain}"
    return line if rejected is None else f"{line}; rejected answers {_signed(rejected)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 2)}"


def _moved(metrics: Mapping[str, Any]) -> str:
    """How far the model went from where it began, as far as that was measured."""
    found = []
    for name, key, unit in (("D", "features", ""), ("KL", "kl", " nats an answer")):
        sides = [figure(metrics.get(f"{key}/{side}")) for side in ("chosen", "rejected")]
        if None not in sides:
            shown = " / ".join(number(side, 3) for side in sides)
            found.append(f"{name} {shown}{unit} (chosen / rejected)")
    square = figure(metrics.get("drift/rejected"))
    if square is not None and square >= 0:
        found.append(f"drift {number(math.sqrt(square), 3)} (rejected)")
    return f"distance from the start: {', '.join(found)}" if found else ""


def _best(run: Run) -> str:
    """Which validation had the lowest loss, whose adapters best/ holds."""
    best = [r for r in run.valid if r.get("best") is True]
    if not best:
        return ""
    kept, last = best[-1], run.valid[-1]
    if kept.get("iteration") == last.get("iteration"):
        return "the lowest validation loss was the last one" if len(run.valid) > 1 else ""
    losses = f"{text(figure(kept.get('loss')))}, the last {text(figure(last.get('loss')))}"
    if kept.get("iteration") == 0:
        return (
            f"no validation loss was lower than before training ({losses}): on these pairs nothing "
            "was won; lower the learning rate or train for less long"
        )
    where = f"iteration {text(kept.get('iteration'))} ({losses})"
    return f"the lowest validation loss was at {where}: {run.path / 'best'} has those adapters"


def commands(run: Run) -> list[str]:
    """What to do with the adapters, quoted for a shell: the last ones, or better ones in best/."""
    folder, best = str(run.path), better(run)
    model = model_words(run)
    adapter = f"--adapter-path {shlex.quote(str(best or folder))}"
    fused = Path(f"{folder.rstrip('/')}-fused")
    anew = " ".join(["", *overwritten(run, fused)])
    return [
        command(run, "evaluate", best),
        command(run, "compare", best),
        f"fpo-mlx chat {model} {adapter}",
        f"fpo-mlx fuse {model} {adapter} --save-path {shlex.quote(str(fused))}{anew}",
    ]


def better(run: Run) -> Path | None:
    """best/, where its adapters are of between the start and the end; None for the last ones.

    Of a run with a target, best/ is held to none.
    """
    targets = (run.settings.get("target_drift"), run.settings.get("target_kl"))
    best = [r for r in run.valid if r.get("best") is True]
    kept = figure(best[-1].get("iteration")) if best else None
    if run.landed or targets != (None, None) or not kept or kept >= _ended(run):
        return None
    return run.path / "best" if (run.path / "best" / WEIGHTS).is_file() else None


def _ended(run: Run) -> float:
    """The last iteration that a report is of."""
    last = (figure(one.get("iteration")) for one in (*run.train[-1:], *run.valid[-1:]))
    return max((n for n in last if n is not None), default=0.0)
