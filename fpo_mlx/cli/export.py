"""`fpo-mlx export`."""

from __future__ import annotations

from pathlib import Path

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import PATH, overwrite_option


@click.command(cls=Command)
@click.option(
    "--adapter-path", type=PATH, default="adapters", show_default=True, help="Adapter folder."
)
@click.option("--output", type=PATH, required=True, help="Folder to write.")
@click.option("--base", help="Hub id of the base model to write down.  [default: the run's]")
@overwrite_option
def export(adapter_path: Path, output: Path, base: str | None, overwrite: bool) -> None:
    """Write adapters as PEFT reads them.

    Without --base the configuration names the base by its hub id, or by its folder's bare name.

    \b
    Example:
      fpo-mlx export --adapter-path adapters --output adapters-peft
    """
    from fpo_mlx import pipeline

    layers = pipeline.export(adapter_path, output, base=base, overwrite=overwrite)
    click.echo(f"{layers} adapted layers in {output}")
