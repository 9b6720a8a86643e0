"""`fpo-mlx report`."""

from __future__ import annotations

from pathlib import Path

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import PATH, claims, overwrite_option, write_text


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN [RUN…]")
@click.option(
    "-o", "--output", type=PATH, default="report.html", show_default=True, help="File to write."
)
@click.option(
    "--results", type=PATH, multiple=True,
    help="JSON of evaluate, features or compare that lies elsewhere or is of several adapters.",
)  # fmt: skip
@overwrite_option
@claims(output="--output")
def report(runs: tuple[Path, ...], output: Path, results: tuple[Path, ...]) -> None:
    """Show runs as one offline HTML page.

    Curves, figures, settings, warnings, answers.

    RUN is the --adapter-path of a training run. Results of `evaluate`, `features` and `compare`
    are shown when they lie in it, or beside it as RUN.json or RUN.*.json.

    \b
    Example:
      fpo-mlx report adapters other-adapters --output report.html
    """
    from fpo_mlx import pipeline

    written = write_text(output, pipeline.report_page(runs, results))
    click.echo(f"report in {written}")
