"""`fpo-mlx doctor` and `fpo-mlx demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import PATH, json_option, write_json
from fpo_mlx.cli.show import Progress, listing, table


@click.command(cls=Command)
@click.option("--hub/--no-hub", default=True, help="Try whether the model hub answers.")
@json_option
def doctor(hub, json_path) -> None:
    """Say what this machine is, and what will stand in the way.

    \b
    Example:
      fpo-mlx doctor --json machine.json
    """
    from fpo_mlx.pipeline.doctor import examine

    findings = examine() if hub else examine(hub_seconds=0)
    write_json(json_path, [asdict(finding) for finding in findings])
    table(("" if f.level == "ok" else f.level, f.topic, f.text) for f in findings)
    for finding in findings:
        if finding.advice:
            click.echo(f"{finding.topic}: {finding.advice}")


@click.command(cls=Command)
@click.option(
    "--output", type=PATH, default="fpo-demo", show_default=True, help="Folder to work in."
)
def demo(output: Path) -> None:
    """Go the whole way once, on a small real model.

    It scores, trains, judges, fuses, answers two questions, and writes a report.

    \b
    Example:
      fpo-mlx demo --output fpo-demo
    """
    from fpo_mlx.demo import run

    show = Progress()
    try:
        report = run.run(workdir=output, say=show.say, show=show)
    finally:
        show.close()
    for sample in report.samples:
        click.echo(f"\n{sample.question}\n\nbefore: {sample.base}\n\nafter:  {sample.tuned}")
    click.echo()
    listing({"first loss": report.first_loss, **report.summary})
    listing({f"seconds for {name}": seconds for name, seconds in report.seconds.items()})
    click.echo(f"adapters in {report.adapters}, fused model in {report.fused}")
