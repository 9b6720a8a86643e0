"""`fpo-mlx cache list | info | verify | merge | export | prune`."""

from __future__ import annotations

from dataclasses import asdict

import click

from fpo_mlx.cli.help import Group
from fpo_mlx.cli.options import (
    PATH,
    READ,
    backend_option,
    claims,
    device_option,
    gather,
    json_option,
    overwrite_json_option,
    overwrite_option,
    preset_option,
    settings,
    write_json,
)
from fpo_mlx.cli.show import listing, say, table
from fpo_mlx.config import DataConfig, ReferenceConfig


@click.group(cls=Group)
def cache() -> None:
    """Reference caches: list, info, verify, merge, export, prune.

    \b
    Example:
      fpo-mlx cache info ref/
    """


@cache.command()
@click.argument("folder", type=PATH)
@json_option
@overwrite_option
@claims(json_path="--json")
def info(folder, json_path) -> None:
    """Say what a cache was made of and what it holds.

    \b
    Example:
      fpo-mlx cache info ref/ --json ref.json
    """
    from fpo_mlx import pipeline

    about = pipeline.cache_info(folder)
    listing(about)
    write_json(json_path, about)


@cache.command()
@click.argument("folder", type=PATH)
@preset_option
@settings(DataConfig, ReferenceConfig, "top_k", "project_out")
@click.option(
    "--adapter-path", "adapter", type=READ, help="SFT adapter that belongs to the reference."
)
@backend_option
@device_option
@click.option(
    "--sample", type=click.IntRange(min=1), default=16, show_default=True, help="Pairs to score."
)
@click.option(
    "--tolerance", type=float,
    help="Largest relative difference that is no error (default 0.01; 0.05 in half precision).",
)  # fmt: skip
@json_option
@overwrite_option
@claims(json_path="--json")
def verify(folder, adapter, backend, device, sample, tolerance, json_path, **values) -> None:
    """Score a sample anew and say how far the cache is from it.

    \b
    Example:
      fpo-mlx cache verify ref/ --model M --sae S --data pairs/
    """
    from fpo_mlx import pipeline

    report = pipeline.cache_verify(
        gather(values), folder, adapter=adapter, backend=backend, device=device, sample=sample,
        tolerance=tolerance, say=say,
    )  # fmt: skip
    listing(asdict(report))
    write_json(json_path, asdict(report))


@cache.command()
@click.argument("parts", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, required=True, help="Cache folder to write to or extend.")
@json_option
@overwrite_json_option
@claims(json_path="--json")
def merge(parts, output, json_path) -> None:
    """Join the parts that several processes or machines made.

    \b
    Example:
      fpo-mlx cache merge ref-0/ ref-1/ --output ref/
    """
    from fpo_mlx import pipeline

    report = pipeline.cache_merge(parts, output)
    listing(asdict(report))
    write_json(json_path, asdict(report))


@cache.command()
@click.argument("folder", type=PATH)
@click.option("--output", type=PATH, required=True, help="JSON Lines file to write.")
@overwrite_option
@claims(output="--output")
def export(folder, output) -> None:
    """Write the rows as JSON Lines.

    \b
    Example:
      fpo-mlx cache export ref/ --output rows.jsonl
    """
    from fpo_mlx import pipeline

    click.echo(f"{pipeline.cache_export(folder, output)} rows in {output}")


root_option = click.option(
    "--folder", type=PATH, help="Where the caches lie (default: the user cache)."
)


@cache.command("list")
@root_option
@json_option
@overwrite_option
@claims(json_path="--json")
def list_(folder, json_path) -> None:
    """List the caches with size, age and owner, the oldest first.

    \b
    Example:
      fpo-mlx cache list
    """
    from fpo_mlx import pipeline

    entries = pipeline.cache_list(folder)
    write_json(json_path, [{**asdict(entry), "folder": str(entry.folder)} for entry in entries])
    if not entries:
        say("no reference caches")
        return
    _show(entries)
    click.echo(f"caches: {len(entries)}, {sum(e.bytes for e in entries) / 1e6:.1f} MB")


@cache.command()
@root_option
@click.option("--older-than", type=click.FloatRange(min=0), help="Days since a run last used it.")
@click.option("--larger-than", type=click.FloatRange(min=0), help="Megabytes.")
@click.option(
    "--model", help="Model folder or id, or a fingerprint's first 6 digits (`cache list`)."
)
@click.option("--dry-run", is_flag=True, help="Say what would go, remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(folder, older_than, larger_than, model, dry_run, yes) -> None:
    """Remove the caches that meet every condition given.

    Those being written are left alone.

    \b
    Example:
      fpo-mlx cache prune --older-than 30 --dry-run
    """
    from fpo_mlx import pipeline

    entries = pipeline.cache_select(
        folder, older_than=older_than, larger_than=larger_than, model=model
    )
    if not entries:
        say("nothing to remove")
        return
    _show(entries)
    total = sum(entry.bytes for entry in entries) / 1e6
    if dry_run:
        click.echo(f"caches that would be removed: {len(entries)}, {total:.1f} MB")
        return
    if not yes:
        question = f"Caches to remove: {len(entries)}, {total:.1f} MB. Remove them?"
        click.confirm(question, abort=True, err=True)
    freed = sum(pipeline.cache_remove(entry.folder) for entry in entries)
    click.echo(f"caches removed: {len(entries)}, {freed / 1e6:.1f} MB")


def _show(entries) -> None:
    table(
        [
            ("cache", "MB", "shards", "days", "model", "SAEs", "writer"),
            *(
                (str(e.folder), round(e.bytes / 1e6, 1), e.shards, round(e.days, 1), e.model[:12],
                 e.saes, e.writer or "")
                for e in entries
            ),
        ]
    )  # fmt: skip
