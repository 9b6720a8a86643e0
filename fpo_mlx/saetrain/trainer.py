"""One loop for every architecture. It yields reports; the caller shows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from fpo_mlx.core import dictionary
from fpo_mlx.core.dictionary import Rule, Summed
from fpo_mlx.errors import Diverged, Interrupted
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.saetrain import state as files_of
from fpo_mlx.saetrain.rows import Source, batches
from fpo_mlx.saetrain.state import State

L0_WEIGHT = 1.0  # of (L0 / k - 1)^2, JumpReLU's pull to its target
ALONE = Ranks()
SMOOTH = 0.95  # of the running means of L0 and threshold


@dataclass(frozen=True)
class Plan:
    """How long and how fast."""

    steps: int
    batch: int
    micro: int  # rows in memory at once; memory and time only (BatchTopK selects within them)
    learning_rate: float
    seed: int
    dead_after: int  # tokens without a use
    warm_up: float = 0.05  # shares of the steps
    decay: float = 0.5
    report_every: int = 50
    save_every: int = 200

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear up, constant, linear down to 0."""
        up = (step + 1) / max(self.warm_up * self.steps, 1)
        down = (self.steps - step) / max(self.decay * self.steps, 1)
        return self.learning_rate * min(1.0, up, down)


@dataclass(frozen=True)
class Report:
    """Means over the steps since the last report."""

    step: int
    steps: int
    tokens: int
    loss: float  # share of the variance that is not explained, nested prefixes averaged
    l0: float
    dead: float  # share of features unused for `dead_after` tokens
    learning_rate: float
    tokens_per_second: float
    peak_memory_gb: float


def train(
    source: Source,
    state: State,
    rule: Rule,
    plan: Plan,
    folder: Path | None = None,
    stop: Callable[[], int | None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Iterator[Report]:
    """Steps from where `state` stands to the plan's end; `state` is moved along.

    folder: for checkpoints and metrics.jsonl; None keeps nothing. ranks: the processes that a
    batch's micro-batches are dealt to; the rows have to be the same on each.
    Raises Diverged when the loss is not finite any more (the last checkpoint stays), Interrupted
    after saving when `stop` gives an exit code.
    """
    stream = batches(source, plan.batch, plan.seed, state.position)
    since, timed = time.perf_counter(), 0
    while state.step < plan.steps:
        rows, position = next(stream)
        done = step(state, rule, plan, rows, ranks)
        state.position = position
        state.window = [a + b for a, b in zip(state.window, (1, *done), strict=True)]
        timed += 1
        if not math.isfinite(done[0]):
            what = f"the loss is {done[0]} at step {state.step}"
            raise Diverged(f"{what}. {_what_next(plan, folder)}")
        last = state.step == plan.steps
        if state.step % plan.report_every == 0 or last:
            speed = timed * plan.batch / (time.perf_counter() - since)
            report = _report(state, plan, speed)
            state.window = [0.0, 0.0, 0.0]
            if folder is not None:
                state.metrics_bytes += files_of.run_folder(folder).log(asdict(report))
            yield report
            since, timed = time.perf_counter(), 0
        code = ranks.largest(stop() or 0) or None
        if folder is not None and (state.step % plan.save_every == 0 or last or code is not None):
            files_of.save(folder, state)
        if code is not None and not last:
            ranks.largest(0)  # it is on the disk: a launcher ends all when one of them ends
            raise stopped(state.step, code)


def stopped(step: int, code: int) -> Interrupted:
    """What ends a run that was asked to stop, once its state is on the disk."""
    how = "go on with --resume, in place of --overwrite if that was given"
    return Interrupted(f"stopped after step {step}; {how}", code)


def _what_next(plan: Plan, folder: Path | None) -> str:
    """After a loss that is no number. No folder: a few steps were timed, and no run was begun."""
    if folder is None:
        return "The activations may be too large for float32: choose another --layer or --site."
    return (
        f"Start anew with --overwrite and a --learning-rate below {plan.learning_rate:g}: on "
        "--resume it may not change. The last checkpoint is kept till then."
    )


def step(
    state: State, rule: Rule, plan: Plan, rows: np.ndarray, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """One update on raw rows [batch, D]. Returns (loss, L0)."""
    done = _measured(state, rule, plan, rows, ranks)
    moved = dictionary.adam_step(
        state.params, done.grads, state.first, state.second, plan.rate(state.step),
        state.warmed + state.step + 1,
    )  # fmt: skip
    mx.eval(moved)
    state.params, state.first, state.second = moved
    state.unused += len(rows)
    state.unused[np.array(done.fired)] = 0
    _remember(state, done)
    state.step += 1
    return float(done.loss), float(done.l0)


def warm(state: State, rule: Rule, plan: Plan, rows: np.ndarray, ranks: Ranks = ALONE) -> None:
    """Adam's moments from gradients on raw rows [n, D], batch by batch; no weight moves.

    An SAE that is there should not be spoiled by the first updates of a cold optimizer, which have
    the full rate in every weight whatever its gradient.
    """
    batch = min(plan.batch, len(rows))  # a sample smaller than a batch is one
    for at in range(0, len(rows) - batch + 1, batch):
        grads = _measured(state, rule, plan, rows[at : at + batch], ranks).grads
        state.warmed += 1
        _, *moments = dictionary.adam_step(
            state.params, grads, state.first, state.second, 0.0, state.warmed
        )
        mx.eval(moments)
        state.first, state.second = moments


def _measured(
    state: State, rule: Rule, plan: Plan, rows: np.ndarray, ranks: Ranks = ALONE
) -> Summed:
    """Loss and gradient of a batch of raw rows [n, D], in micro-batches dealt to the processes."""
    x = (mx.array(rows) - mx.array(state.centre)) * state.scale
    pull = mx.array(2 * L0_WEIGHT * (state.l0 / rule.k - 1) / rule.k)
    dead = dead_list(state.unused, plan.dead_after)
    parts = []
    micro = min(plan.micro, max(len(rows) // ranks.size, 1))
    for at in range(ranks.rank * micro, len(rows), ranks.size * micro):
        chunk = x[at : at + micro]
        part = dictionary.gradients(rule, state.params, chunk, 1 / len(rows), pull, dead)
        mx.eval(part.grads, part.loss, part.l0, part.fired, part.threshold)
        parts.append(part)
    return _of_all(dictionary.add_parts(parts), ranks)


def _of_all(own: Summed, ranks: Ranks) -> Summed:
    """The parts of all processes, added; one message."""
    if ranks.size == 1:
        return own
    least = mx.where(mx.arange(ranks.size) == ranks.rank, own.threshold, 0.0)
    grads, loss, l0, fired, least = ranks.sum(
        [own.grads, own.loss, own.l0, own.fired.astype(mx.float32), least]
    )
    return Summed(grads, loss, l0, fired > 0, least.min())


def dead_list(unused: np.ndarray, after: int) -> mx.array | None:
    """Dead features, filled up with -1 to a power of two so that few shapes occur; None: none."""
    found = np.flatnonzero(unused > after)
    if not len(found):
        return None
    size = min(max(64, 1 << (len(found) - 1).bit_length()), len(unused))
    return mx.array(np.pad(found, (0, size - len(found)), constant_values=-1).astype(np.int32))


def _remember(state: State, done: Summed) -> None:
    """Running means; the first steps count fully."""
    keep = min(SMOOTH, state.step / (state.step + 1))
    least = float(done.threshold)
    if math.isfinite(least):
        state.threshold = keep * state.threshold + (1 - keep) * least
    state.l0 = keep * state.l0 + (1 - keep) * float(done.l0)


def _report(state: State, plan: Plan, speed: float) -> Report:
    steps, loss, l0 = state.window
    return Report(
        step=state.step,
        steps=plan.steps,
        tokens=state.step * plan.batch,
        loss=loss / steps,
        l0=l0 / steps,
        dead=float((state.unused > plan.dead_after).mean()),
        learning_rate=plan.rate(state.step - 1),
        tokens_per_second=speed,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )
