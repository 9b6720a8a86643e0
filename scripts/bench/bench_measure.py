"""Interleaved samples of several subjects; medians, ratios within a round, Markdown tables."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import mlx.core as mx

MB = 1e6


@dataclass(frozen=True)
class Sample:
    seconds: float
    above: int | None  # peak bytes above what was alive before; None where only the total is known
    total: int  # peak bytes, weights and optimizer state included


class Subject(Protocol):
    """Something to be timed; `name` is its row in the table."""

    @property
    def name(self) -> str: ...
    def sample(self) -> Sample: ...


@dataclass(frozen=True)
class Local:
    """A function of this process that evaluates all that it computes."""

    name: str
    run: Callable[[], object]
    resident: int = 0  # bytes that it needs before it starts: weights, optimizer state

    def sample(self) -> Sample:
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        self.run()
        seconds = time.perf_counter() - started
        above = max(0, mx.get_peak_memory() - before)
        return Sample(seconds, above, above + self.resident)


@dataclass(frozen=True)
class Row:
    """One subject over all rounds. Ratios are to the case's base, medians over the rounds."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    above: float | None
    total: float
    time_ratio: float
    memory_ratio: float | None  # above the weights
    total_ratio: float


@dataclass(frozen=True)
class Check:
    """A figure against the most that it may be (issue of the project: "must show")."""

    figure: str
    value: float
    limit: float

    @property
    def held(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Result:
    """One case: rows of timed subjects, or a plain table."""

    case: str
    title: str
    rows: Sequence[Row] = ()
    table: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    checks: Sequence[Check] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "held": check.held} for check in self.checks]
        return {**asdict(self), "checks": checks}


Samples = dict[str, list[Sample]]


def interleave(
    subjects: Sequence[Subject], repeats: int, warmup: int, say: Callable[[str], None]
) -> Samples:
    """Every subject once a round, the order turned by one each time; warm-up rounds are dropped."""
    samples: Samples = {subject.name: [] for subject in subjects}
    for turn in range(-warmup, repeats):
        shift = turn % len(subjects)
        for subject in (*subjects[shift:], *subjects[:shift]):
            sample = subject.sample()
            say(f"  {'warm-up' if turn < 0 else turn + 1} {subject.name}: {sample.seconds:.2f} s")
            if turn >= 0:
                samples[subject.name].append(sample)
    return samples


def rows_of(samples: Samples, base: str) -> list[Row]:
    """The table of a case, ratios to the subject `base`."""
    return [_row(name, own, samples[base]) for name, own in samples.items()]


def _row(name: str, own: Sequence[Sample], base: Sequence[Sample]) -> Row:
    seconds = [sample.seconds for sample in own]
    pairs = list(zip(own, base, strict=True))
    above = [sample.above for sample in own if sample.above is not None]
    shares = [a.above / b.above for a, b in pairs if a.above is not None and b.above]
    return Row(
        name,
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        statistics.median(above) if above else None,
        statistics.median(sample.total for sample in own),
        statistics.median(a.seconds / b.seconds for a, b in pairs),
        statistics.median(shares) if shares else None,
        statistics.median(a.total / b.total for a, b in pairs if b.total) if base[0].total else 1.0,
    )


def time_ratio(samples: Samples, name: str, base: str) -> float:
    """Median over the rounds of one subject's time over another's."""
    return _row(name, samples[name], samples[base]).time_ratio


def memory_ratio(samples: Samples, name: str, base: str) -> float:
    """The same for peak memory above the weights."""
    return _row(name, samples[name], samples[base]).memory_ratio or float("nan")


def total_ratio(samples: Samples, name: str, base: str) -> float:
    """The same for peak memory with the weights."""
    return _row(name, samples[name], samples[base]).total_ratio


def markdown(result: Result) -> str:
    """A case as Markdown: heading, table, notes."""
    lines = [f"### {result.case}: {result.title}", ""]
    if result.rows:
        lines += _table(
            ("subject", "s (median)", "min to max", "MB above weights", "MB in all")
            + ("time ratio", "memory ratio", "total ratio"),
            [
                (
                    row.name, f"{row.seconds:.3f}", f"{row.fastest:.3f} to {row.slowest:.3f}",
                    _mb(row.above), _mb(row.total or None), f"{row.time_ratio:.3f}",
                    "" if row.memory_ratio is None else f"{row.memory_ratio:.3f}",
                    f"{row.total_ratio:.3f}",
                )
                for row in result.rows
            ],
        )  # fmt: skip
    if result.table:
        names = tuple(result.table[0])
        lines += _table(names, [tuple(_cell(line[n]) for n in names) for line in result.table])
    return "\n".join(lines + [f"- {note}" for note in result.notes]) + "\n"


def checks_markdown(checks: Sequence[Check]) -> str:
    """All figures against their limits."""
    rows = [
        (c.figure, f"{c.value:.3f}", f"{c.limit:.2f}", "yes" if c.held else "NO") for c in checks
    ]
    return "\n".join(
        ["### Must show", "", *_table(("figure", "measured", "at most", "held"), rows)]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _mb(size: float | None) -> str:
    return "" if size is None else f"{size / MB:.0f}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
