"""`fpo-mlx cache info | verify | merge | export`."""

from __future__ import annotations

from dataclasses import asdict

import click

from fpo_mlx.cli.options import (
    PATH,
    backend_option,
    device_option,
    gather,
    json_option,
    preset_option,
    settings,
    write_json,
)
from fpo_mlx.cli.show import listing, say
from fpo_mlx.config import DataConfig, ReferenceConfig


@click.group()
def cache() -> None:
    """Reference caches: look at one, verify it, merge parts, export the rows.

    \b
    Example:
      fpo-mlx cache info ref/
    """


@cache.command()
@click.argument("folder", type=PATH)
@json_option
def info(folder, json_path) -> None:
    """Say what a cache was made of and what it holds.

    \b
    Example:
      fpo-mlx cache info ref/ --json ref.json
    """
    from fpo_mlx import pipeline

    about = pipeline.cache_info(folder)
    write_json(json_path, about)
    listing(about)


@cache.command()
@click.argument("folder", type=PATH)
@settings(DataConfig, ReferenceConfig)
@preset_option
@click.option("--adapter-path", "adapter", help="SFT adapter that belongs to the reference.")
@backend_option
@device_option
@click.option(
    "--sample", type=click.IntRange(min=1), default=16, show_default=True, help="Pairs to score."
)
@click.option(
    "--tolerance", type=float, default=0.01, show_default=True,
    help="Largest relative difference that is no error.",
)  # fmt: skip
@json_option
def verify(folder, adapter, backend, device, sample, tolerance, json_path, **values) -> None:
    """Score a random sample anew on this machine and say how far the cache is from it.

    \b
    Example:
      fpo-mlx cache verify ref/ --model M --sae S --data pairs/
    """
    from fpo_mlx import pipeline

    report = pipeline.cache_verify(
        gather(values), folder, adapter=adapter, backend=backend, device=device, sample=sample,
        tolerance=tolerance, say=say,
    )  # fmt: skip
    write_json(json_path, asdict(report))
    listing(asdict(report))


@cache.command()
@click.argument("parts", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, required=True, help="Cache folder to write to or extend.")
@json_option
def merge(parts, output, json_path) -> None:
    """Join the parts that several processes or machines made with one setting.

    \b
    Example:
      fpo-mlx cache merge ref-0/ ref-1/ --output ref/
    """
    from fpo_mlx import pipeline

    report = pipeline.cache_merge(parts, output)
    write_json(json_path, asdict(report))
    listing(asdict(report))


@cache.command()
@click.argument("folder", type=PATH)
@click.option("--output", type=PATH, required=True, help="JSON Lines file to write.")
def export(folder, output) -> None:
    """Write the rows as JSON Lines.

    \b
    Example:
      fpo-mlx cache export ref/ --output rows.jsonl
    """
    from fpo_mlx import pipeline

    click.echo(f"{pipeline.cache_export(folder, output)} rows in {output}")
