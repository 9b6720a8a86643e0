"""`fpo-mlx pairs plan | check`: what it will cost, and what is wrong with the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    READ,
    claims,
    json_option,
    memory_option,
    overwrite_option,
    section_options,
    write_json,
)
from fpo_mlx.cli.show import duration, listing, say, table, terms, verdict
from fpo_mlx.config import load_section
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs.settings import GenerateConfig

if TYPE_CHECKING:
    from fpo_mlx.pipeline.pairs_plan import Cost


@click.command(cls=Command)
@section_options(GenerateConfig)
@click.option("--judge", type=READ, help="Model that will judge: folder or hub id.")
@click.option("--criteria", type=READ, help="Text file that says what a better answer is.")
@click.option(
    "--compare", type=click.Choice(["all", "neighbours"]), default="all", show_default=True,
    help="Pairs of a prompt's answers to compare.",
)  # fmt: skip
@memory_option
@json_option
@overwrite_option
@claims(json_path="--json")
def plan(config, judge, criteria, compare, memory_gb, json_path, **values) -> None:
    """Say whether answering and judging fit into memory, and how long they take.

    No weight is read or downloaded: of a model of the hub the headers of its files are enough.
    Every answer is taken to be as long as it may be.

    \b
    Example:
      fpo-mlx pairs plan --model M --prompts p.txt --judge J --memory-gb 11.5
    """
    from fpo_mlx import pipeline

    found = pipeline.pairs_plan(
        load_section(GenerateConfig, values, config),
        judge=judge, neighbours=compare == "neighbours", criteria=criteria, memory_gb=memory_gb,
        say=say,
    )  # fmt: skip
    click.echo(f"generate: {found.answers} answers to {found.prompts} prompts")
    _cost(found.generate, found.memory)
    click.echo(
        f"\njudge: {found.questions} questions (both orders) of at most "
        f"{found.question_tokens} tokens"
    )
    if found.judge:
        _cost(found.judge, found.memory)
    write_json(json_path, found.as_dict())


def _cost(cost: Cost, memory: float) -> None:
    found = verdict(cost.peak, cost.fits, memory)
    click.echo(f"{found}; at most about {duration(cost.seconds)}")
    terms(cost.terms)


@click.command(cls=Command)
@click.argument("candidates", type=PATH, required=False)
@click.option("--verdicts", type=PATH, multiple=True, help="File of verdicts; repeatable.")
@json_option
@overwrite_option
@claims(json_path="--json")
def check(candidates, verdicts, json_path) -> None:
    """Look for what is wrong with files of candidates and verdicts.

    Exit code 3 when there are lines that cannot be read. No file is changed.

    \b
    Example:
      fpo-mlx pairs check candidates.jsonl --verdicts verdicts.jsonl
    """
    if candidates is None and not verdicts:
        raise ConfigError("nothing to look at: give a file of candidates, or --verdicts.")
    check_files(candidates, verdicts, json_path)


def check_files(candidates: Path | None, verdicts: tuple[Path, ...], json_path: Path | None):
    """Also what `fpo-mlx check` does with such a file. Raises: DataError for unreadable lines."""
    from fpo_mlx import pipeline

    checks = pipeline.pairs_check(candidates, verdicts)
    for one in checks:
        click.echo(f"{one.path}: {one.lines} lines of {one.holds}")
        listing({f"  {name}": value for name, value in one.figures.items()})
        show_judges(one.judges)
        table((kind.level, kind.kind, kind.count, kind.first) for kind in one.kinds)
    write_json(json_path, [one.as_dict() for one in checks])
    if refused := sum(one.refused for one in checks):
        faults = [kind.first for one in checks for kind in one.kinds if kind.level == "refused"]
        total = sum(one.lines for one in checks)
        raise DataError(f"{refused} of {total} lines cannot be read:", faults)


def show_judges(judges) -> None:
    """Figures of each, without those that are not known."""
    for name, summary in judges.items():
        click.echo(name)
        figures = {k: v for k, v in summary.as_dict().items() if v is not None}
        listing({f"  {key.replace('_', ' ')}": value for key, value in figures.items()})
