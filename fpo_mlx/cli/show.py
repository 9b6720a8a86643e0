"""What a run looks like: lines on stderr, a bar only on a terminal, tables on stdout."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

from fpo_mlx.machine.processes import is_first
from fpo_mlx.train.events import (
    LandedReport,
    Report,
    SavedReport,
    SkippedReport,
    StepReport,
    StoppedReport,
    ValidReport,
)

GB = 1e9
TAB = 4  # cells
GONE = (errno.EIO, errno.EPIPE)  # what writing to a closed terminal or pipe ends in
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # a line's direction


@contextmanager
def unheard() -> Iterator[None]:
    """Around what is written to a person: work goes on, and is saved, when there is none left."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise
        for stream in (sys.stdout, sys.stderr):
            if _is_dead(stream):
                _to_nowhere(stream)


def _is_dead(stream: TextIO) -> bool:
    """Whether nobody reads it: a closed terminal is no terminal any more, though a device."""
    try:
        stream.flush()
        number = stream.fileno()
        return stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number)
    except (OSError, ValueError):
        return True


def _to_nowhere(stream: TextIO) -> None:
    """What it still holds, and all that anyone writes to it from now on."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def say(text: str) -> None:
    """On stderr; of several processes the first speaks."""
    if is_first():
        with unheard():
            click.echo(text, err=True)


def result(text: str) -> None:
    """On stdout; of several processes the first speaks."""
    if is_first():
        with unheard():
            click.echo(text)


class Steps:
    """A bar of (done, to do) on a terminal until all is done, nothing elsewhere."""

    def __init__(self, what: str, unit: str = "it") -> None:
        self._what, self._unit, self._bar = what, unit, None

    @unheard()
    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=total,
                desc=self._what,
                unit=self._unit,
                disable=not is_first() or None,
                leave=False,
            )
        self._bar.update(done - self._bar.n)
        if done >= total:  # or the next line would stand behind it
            self._bar.close()
            self._bar = None


class Bar:
    """The same for reports of a reference's run."""

    def __init__(self, what: str) -> None:
        self._steps = Steps(what, "pair")

    def __call__(self, report: Any) -> None:
        self._steps(report.pairs, report.total_pairs)


class Progress:
    """A line per report; on a terminal a bar below them."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._bar = None

    def begin(self, total: int) -> None:
        """The number of iterations of the run, once it is known."""
        self._total = total

    @unheard()
    def say(self, text: str) -> None:
        if self._bar is None or not is_first():
            say(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def __call__(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self._advance(report.iteration)
            for warning in report.warnings:
                self.say(f"warning: {warning}")
            found = "" if report.alpha is None else f"  alpha {report.alpha:.3g}"
            if report.part is not None and report.part < 1:
                found += f"  step {report.part:.2f}"
            self.say(
                f"{report.iteration:>6}  loss {report.loss:.4f}  {describe(report.metrics)}{found}"
                f"  lr {report.learning_rate:.1e}  {report.tokens_per_second:.0f} tok/s  "
                f"peak {report.peak_memory_gb:.2f} GB"
            )
        elif isinstance(report, ValidReport):
            for warning in report.warnings:
                self.say(f"warning: {warning}")
            best = "  best so far" if report.best else ""
            self.say(
                f"{report.iteration:>6}  valid {report.loss:.4f}  {describe(report.metrics)}  "
                f"{report.pairs} pairs in {report.seconds:.0f} s{best}"
            )
        elif isinstance(report, SkippedReport):
            self.say(f"{report.iteration:>6}  update left out: {report.reason}")
        elif isinstance(report, StoppedReport):
            self.say(
                f"{report.iteration:>6}  stopped early: no better validation loss in "
                f"{report.validations} validations; the best, {report.best_loss:.4f} at iteration "
                f"{report.best_iteration}, is in best/"
            )
        elif isinstance(report, LandedReport):
            what, unit = report.figure, " nats" if report.figure == "kl" else ""
            self.say(
                f"{report.iteration:>6}  {what} {report.before:.4g}{unit} on {report.pairs} "
                f"validation pairs, wanted {report.target:g}: saved is {report.part:.3f} of the "
                f"change, {what} {report.after:.4g}{unit}  {describe(report.metrics)}"
            )
        elif isinstance(report, SavedReport) and report.numbered:
            self.say(f"{report.iteration:>6}  saved")

    @unheard()
    def _advance(self, iteration: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                desc="train",
                unit="it",
                disable=not is_first() or None,
                leave=False,
            )
        self._bar.update(iteration - self._bar.n)

    @unheard()
    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Whole(Progress):
    """Of several parts one bar, if any, with the time that is left; on a terminal only."""

    @unheard()
    def so_far(self, share: float) -> None:
        """How much of the whole is done, 0 to 1."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=1.0,
                bar_format="{percentage:3.0f}% |{bar:30}| {elapsed}, about {remaining} left",
                smoothing=0,  # the mean since the start: parts differ
                disable=None,
                leave=False,
            )
        self._bar.update(share - self._bar.n)

    def _advance(self, iteration: int) -> None:
        """Training is a part of the whole: its iterations move no bar of their own."""


def describe(metrics: Mapping[str, float]) -> str:
    """The few figures that belong on a line: accuracy never stands alone."""
    text = (
        f"acc {metrics['rewards/accuracies']:.2f}  margin {metrics['rewards/margins']:.4f}  "
        f"chosen {metrics['logps_per_token/chosen_change']:+.4f} nats/token"
    )
    if "features/chosen" in metrics:
        text += f"  D {metrics['features/chosen']:.3g} / {metrics['features/rejected']:.3g}"
    if "drift/rejected" in metrics:
        text += f"  drift {metrics['drift/rejected'] ** 0.5:.3f}"
    if "kl/chosen" in metrics:
        text += f"  KL {metrics['kl/chosen']:.3g} / {metrics['kl/rejected']:.3g}"
    return text


def printable(text: str) -> str:
    """What a model or a file says, without characters that move the cursor or turn the line around.

    Joiners, soft hyphens and spaces of all kinds are part of ordinary text.
    """
    return "".join(" " if _moves(char) else char for char in text)


def _moves(char: str) -> bool:
    unseen = unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"
    return unseen or unicodedata.bidirectional(char) in TURNS


def one_line(text: str) -> str:
    """The same without tabs and ends of lines."""
    return "".join(" " if char in "\n\t\u2028\u2029" else char for char in printable(text))


def cells(text: str) -> int:
    """Columns that a terminal gives a text: two for a wide character, none for an accent on one."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )  # fmt: skip


def padded(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def end_of(text: str, width: int) -> str:
    """A name in at most `width` cells; of a long one the end, which tells it from others."""
    start = next(at for at in range(len(text) + 1) if cells(text[at:]) <= width - (at > 0))
    return f"…{text[start:]}" if start else text


def wrapped(line: str, width: int) -> list[str]:
    """One line as lines of at most `width` cells, broken at spaces; a wider word is cut."""
    lines = [""]
    for part in re.findall(r"\s+|\S+", line.expandtabs(TAB)):
        if cells(lines[-1]) + cells(part) <= width:
            lines[-1] += part
        elif part.isspace():
            lines.append("")
        else:
            lines += [""] if lines[-1].strip() else []
            for char in part:
                lines += [""] if cells(lines[-1]) + cells(char) > width else []
                lines[-1] += char
    return [line.rstrip() for line in lines]


def feature_name(sae: int, feature: int) -> str:
    """With the number of its SAE, where that is not the first."""
    return f"{sae}:{feature}" if sae else str(feature)


def number(value: Any) -> str:
    if isinstance(value, tuple | list):
        interval = len(value) == 2 and all(isinstance(v, float) for v in value)
        return (" … " if interval else ", ").join(number(v) for v in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def verdict(peak: float, fits: bool, memory: float) -> str:
    """Whether a command fits, all in bytes."""
    into = "fits" if fits else "DOES NOT FIT"
    return f"peak {peak / GB:.2f} GB, {into} into {memory / GB:.2f} GB"


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def terms(found: Iterable[Any]) -> None:
    """What a peak is made of, a line each."""
    table((f"  {term.name}", f"{term.bytes / GB:.3f} GB") for term in found if term.bytes)


def listing(values: Mapping[str, Any]) -> None:
    """One `name  value` line each."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {one_line(number(value))}")


def table(rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    rows = list(rows)
    texts = [[one_line(number(cell)) for cell in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(*texts, strict=True)]
    for row, own in zip(rows, texts, strict=True):
        line = [
            text.rjust(width) if isinstance(value, int | float) else padded(text, width)
            for value, text, width in zip(row, own, widths, strict=True)
        ]
        click.echo("  ".join(line).rstrip())
