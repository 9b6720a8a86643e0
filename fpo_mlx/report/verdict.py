"""What a run's own validations say of it, for a reader to whom it is the first one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fpo_mlx.intervals import share_to_hold, wilson
from fpo_mlx.report import findings
from fpo_mlx.report.commands import (
    HELD_OUT,
    SPLITS,
    commands,
    held_out_splits,
    lowest,
    of_others,
)
from fpo_mlx.report.read import Run, figure, on_training, part
from fpo_mlx.report.tables import number, text

CHANGE = "logps_per_token/{}_change"
SIDES = ("chosen", "rejected")
# rewards are gains on the reference for every objective, one whose loss has none, too
RIGHT = "share of pairs whose chosen answer gained more than the rejected one"
STILL = 2e-3  # of a log-prob: twice what rounding to half precision alone may change


def measured(run: Run) -> list[str]:
    """Lines for the end of a training: what was measured, what to beware of."""
    own = replace(run, results={})  # they are of adapters before, or say no more than the run
    warnings = (*findings.missed(own), *findings.collapse(own))
    return [*held_out(run), *(f"warning: {said}" for said in warnings)]


def verdict(run: Run) -> list[str]:
    """The same, and what comes next."""
    other = f" ({HELD_OUT} is your file of other pairs)" if of_others(run) else ""
    return [*measured(run), f"Next{other}:", *(f"  {command}" for command in commands(run))]


def held_out(run: Run) -> list[str]:
    """What the validations measured, before and after; or that there were none."""
    if not run.valid:
        return list(_without(run))
    first, last = _first(run), run.end or run.valid[-1]
    before, after = part(first, "metrics"), part(last, "metrics")
    n = figure(last.get("pairs")) or 0.0
    when = f"after {text(last.get('iteration'))} iterations"
    head = f"On {_of_all(run, n)} {'before -> ' if before else ''}{when}:"
    lines = (
        _accuracy(after, min(n, figure(last.get("witnesses")) or n)),
        _pair("chosen answer is the likelier one", before, after, "policy_accuracy"),
        _margin(before, after),
        _answers(after),
        _moved(after),
        _saved(run) if run.end else _best(run),
        _later(run, last),
    )
    return [head, *(f"  {line}" for line in lines if line)]


def _of_all(run: Run, n: float) -> str:
    """ "25 of 1000 held-out pairs", with what looks at all of them."""
    there = figure(part(run.record, "splits").get("valid"))
    if there is None or there <= n:
        return f"{number(n)} held-out pairs"
    return f"{number(n)} of {number(there)} held-out pairs (--val-batches -1 looks at all)"


def _without(run: Run) -> Iterator[str]:
    evaluation = run.results.get("evaluate")
    if evaluation is None or evaluation.stale or on_training(evaluation.value):
        yield _unseen(run)
    if not run.train:
        return
    metrics = part(run.train[-1], "metrics")
    yield f"Mean of the last report, at iteration {text(run.train[-1].get('iteration'))}:"
    share = figure(metrics.get("rewards/accuracies"))
    if share is not None:
        yield (
            f"  accuracy {number(share, 3)}: {RIGHT}; of training pairs, so it says little of "
            "others"
        )
    yield from (f"  {line}" for line in (_answers(metrics), _moved(metrics)) if line)


def _unseen(run: Run) -> str:
    """That this run says nothing of other pairs than its own, and what does."""
    what = "whether the model learned more than its own training pairs, this run cannot say."
    there = held_out_splits(run)
    if there:
        split = next(name for name in SPLITS["evaluate"] if name in there)
        return f"No validation was made: {what} `evaluate` can, on the {split} split."
    held = "was held out" if there is not None else "was looked at that is held out"
    share = share_to_hold(figure(part(run.record, "splits").get("train")))
    return (
        f"No pair {held}: {what} Hold some back (--valid-share {share:g}) and train again, or "
        "evaluate on pairs of your own."
    )


def _first(run: Run) -> Mapping[str, Any]:
    """The validation before the first update; empty where it is of other pairs, or not there."""
    first, last = run.valid[0], run.end or run.valid[-1]
    same = first.get("iteration") == 0 and first.get("pairs") == last.get("pairs")
    return first if same and first.get("iteration") != last.get("iteration") else {}


def _accuracy(metrics: Mapping[str, Any], n: float) -> str:
    """With an interval, and with what so few pairs cannot tell. n: pairs of different prompts."""
    share = figure(metrics.get("rewards/accuracies"))
    if share is None or not math.isfinite(share) or n < 1:
        return ""
    low, high = wilson(share, n)
    line = (
        f"accuracy {number(share, 3)} ({number(low, 2)} to {number(high, 2)} with 95 % "
        f"confidence): {RIGHT}; "
    )
    if low > 0.5:
        return line + "chance is 0.5"
    if _hardly(metrics):
        return line + "the model has hardly moved yet, and a pair where it did not counts as wrong"
    if high < 0.5:
        return line + "worse than chance (0.5)"
    return line + "so few pairs cannot tell that from chance (0.5)"


def _hardly(metrics: Mapping[str, Any]) -> bool:
    """Whether the log-probs are, on the mean, about where they were."""
    for side in SIDES:
        change = figure(metrics.get(CHANGE.format(side)))
        size = figure(metrics.get(f"logps_per_token/{side}"))
        if change is None or not abs(change) <= STILL * max(1.0, abs(size or 0.0)):
            return False
    return True


def _pair(name: str, before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """ "margin 0 -> 0.04", or the end alone."""
    then, now = figure(before.get(key)), figure(after.get(key))
    if now is None:
        return ""
    return f"{name}: {'' if then is None else f'{number(then, 3)} -> '}{number(now, 3)}"


def _margin(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    line = _pair("reward margin", before, after, "rewards/margins")
    return f"{line} (gain of chosen less that of rejected answers, times beta)" if line else ""


def _answers(metrics: Mapping[str, Any]) -> str:
    """What chosen and rejected answers gained or lost, in nats and in plain words."""
    chosen, rejected = (figure(metrics.get(CHANGE.format(s))) for s in SIDES)
    if chosen is None or not math.isfinite(chosen):
        return ""
    times = f"{math.exp(min(chosen, 50.0)):.2g}"
    plain = f"a token is {'about' if times == '1' else f'{times} times'} as likely as before"
    line = f"chosen answers {_signed(chosen)} nats/token: {plain}"
    return line if rejected is None else f"{line}; rejected answers {_signed(rejected)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 2)}"


def _moved(metrics: Mapping[str, Any]) -> str:
    """How far the model went from where it began, as far as that was measured."""
    found = []
    square = figure(metrics.get("drift/rejected"))
    if square is not None and square >= 0:
        found.append(f"features by {number(math.sqrt(square), 3)} of their size (drift, rejected)")
    for name, key, unit in (("D of features", "features", ""), ("KL", "kl", " nats an answer")):
        sides = [figure(metrics.get(f"{key}/{side}")) for side in SIDES]
        if None not in sides:
            shown = " / ".join(number(side, 3) for side in sides)
            found.append(f"{name} {shown}{unit} (chosen / rejected)")
    return f"distance from the start (0 is none): {', '.join(found)}" if found else ""


def _later(run: Run, last: Mapping[str, Any]) -> str:
    """That what was validated is not the end: a run was resumed without, or stopped between."""
    seen, ended = figure(last.get("iteration")), _ended(run)
    if seen is None or ended <= seen:
        return ""
    return f"training went on to iteration {number(ended)}, and no validation saw that"


def _saved(run: Run) -> str:
    """That only a part of the change was saved, to which best/ was not held."""
    said = findings.saved_part(run)
    other = " (best/ is of a whole change)" if lowest(run) else ""
    return f"{said[0].lower()}{said[1:]}{other}" if said else ""


def _best(run: Run) -> str:
    """Which validation had the lowest loss, as best/ has it, where that is not the end."""
    kept, last = lowest(run), run.valid[-1]
    if kept is None:
        return ""
    alone = kept.get("iteration") == last.get("iteration")
    if alone and (kept.get("iteration") == 0 or not _later(run, last)):
        return ""
    losses = text(figure(kept.get("loss")))
    losses += "" if alone else f", the last {text(figure(last.get('loss')))}"
    if kept.get("iteration") == 0:
        return (
            f"no validation loss was lower than before training ({losses}): on these pairs nothing "
            "was won; lower the learning rate or train for less long"
        )
    where = f"iteration {text(kept.get('iteration'))} ({losses})"
    return f"the lowest validation loss was at {where}: {run.path / 'best'} has those adapters"


def _ended(run: Run) -> float:
    """The last iteration that a report is of."""
    last = (figure(one.get("iteration")) for one in (*run.train[-1:], *run.valid[-1:]))
    return max((n for n in last if n is not None), default=0.0)
