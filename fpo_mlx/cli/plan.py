"""`fpo-mlx plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    claims,
    gather,
    json_option,
    memory_option,
    preset_option,
    settings,
    write_json,
)
from fpo_mlx.cli.show import GB, duration, say, terms, verdict
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig, TrainConfig

if TYPE_CHECKING:
    from fpo_mlx.pipeline.plan import CommandPlan


@click.command(cls=Command)
@preset_option
@settings(DataConfig, ReferenceConfig, Objective, TrainConfig)
@memory_option
@json_option
@claims(json_path="--json")
def plan(memory_gb, json_path, **values) -> None:
    """Say whether a run fits into memory, and how long it takes.

    No weight of the model is read or downloaded (an SAE is): of a model of the hub the headers of
    its files are enough. With --data the lengths are those of its training pairs; without it a
    pair as long as --max-seq-length is assumed.

    \b
    Example:
      fpo-mlx plan --model M --sae S --data pairs/ --batch-size 2 --memory-gb 11.5
    """
    from fpo_mlx import pipeline

    report = pipeline.plan(gather(values), memory_gb=memory_gb, say=say)
    longest = report.longest
    click.echo(
        f"heaviest pair: prompt {longest.prompt}, responses {longest.chosen} and "
        f"{longest.rejected} tokens"
    )
    for name, command in (("precompute", report.precompute), ("train", report.train)):
        found = verdict(command.peak, command.fits, report.memory)
        click.echo(f"\n{name}: {found}; {_time(command)}")
        terms(command.terms)
    if report.kept:
        click.echo(
            f"\nbeside it MLX keeps up to {report.kept / GB:.2f} GB of freed buffers while there "
            "is room; where memory is short it gives them back"
        )
    click.echo()
    for line in report.advice:
        click.echo(line)
    write_json(json_path, report.as_dict())


def _time(command: CommandPlan) -> str:
    each = f"about {command.seconds_per_pair:.2g} s per pair"
    if command.seconds is None:
        return each
    return f"{each}, {duration(command.seconds)} in all"
