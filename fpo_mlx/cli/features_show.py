"""`fpo-mlx features show`: one feature's page, in the terminal and as HTML."""

from __future__ import annotations

from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    READ,
    claims,
    gather,
    json_option,
    labels_option,
    overwrite_option,
    pairs_looked_at,
    settings,
    write_json,
    write_text,
)
from fpo_mlx.cli.show import listing, one_line, printable, say, table
from fpo_mlx.config import DataConfig, ReferenceConfig
from fpo_mlx.judge.scaling import in_words

BAR = 30  # characters of the longest


@click.command("show", cls=Command)
@click.argument("feature", type=click.IntRange(min=0))
@settings(DataConfig, ReferenceConfig, "init_adapter")
@click.option("--adapter-path", type=READ, help="Adapter: what did training do to the feature?")
@pairs_looked_at("valid")
@click.option(
    "--examples", type=click.IntRange(min=0), default=8, show_default=True,
    help="Texts to show, those in which it fires most.",
)  # fmt: skip
@labels_option
@click.option("--output", type=PATH, help="HTML page to write, which needs no network.")
@json_option
@overwrite_option
@claims(output="--output", json_path="--json")
def show(
    feature, adapter_path, split, limit, examples, labels, output, json_path, **values
) -> None:
    """Show one feature: where it fires, what it writes, what is like it.

    With an adapter also what training did to it: the same figures before and after, and whether it
    really moved.

    \b
    Example:
      fpo-mlx features show 812 --model M --sae S --data pairs/ --output 812.html
    """
    from fpo_mlx import pipeline

    page = pipeline.feature_page(
        gather(values), feature, adapter_path=adapter_path, split=split, limit=limit,
        examples=examples, labels=labels, say=say,
    )  # fmt: skip
    _print(page)
    if output is not None:
        click.echo(f"page in {write_text(output, page.html())}")
    write_json(json_path, page.as_dict())


def _print(page: Any) -> None:
    name = page.label or page.link
    click.echo(f"feature {page.feature}{f': {one_line(name)}' if name else ''}, {page.site}")
    sides = [("before", page.before), *([("after", page.after)] if page.after else [])]
    names = ("density", "texts", "mean_active", "largest", "chosen", "rejected")
    table([("", *names), *((side, *(f"{getattr(a, n):.4g}" for n in names)) for side, a in sides)])
    if page.after:
        moved = {"change": page.change, "effect_size": page.effect_size}
        listing(moved | ({"moved": in_words(page.scaling)} if page.scaling else {}))
    _histogram(sides)
    for title, found in (("promotes", page.promoted), ("suppresses", page.suppressed)):
        words = "  ".join(f"{printable(token)!r} {weight:+.3g}" for token, weight in found)
        if words:
            click.echo(f"{title}: {words}")
    near = ", ".join(
        f"{i}{f' {one_line(label)}' if label else ''} {cosine:.2f}"
        for i, cosine, label in page.similar
    )
    if near:
        click.echo(f"similar: {near}")
    for one in page.contexts:
        text = one_line(one.text)
        click.echo(f"{one.activation:>8.4g}  {text}  ({one.where})")


def _histogram(sides: Any) -> None:
    """Active positions by activation; a line per bin, a bar per model."""
    most = max(max(a.counts) for _, a in sides)
    for at in range(len(sides[0][1].counts) if most else 0):
        upper = sides[0][1].top * (at + 1) / len(sides[0][1].counts)
        bars = [
            f"{'█' * round(BAR * a.counts[at] / most):<{BAR}} {a.counts[at]:>6}" for _, a in sides
        ]
        click.echo(f"{f'≤ {upper:.3g}':>10}  {'  '.join(bars)}".rstrip())
