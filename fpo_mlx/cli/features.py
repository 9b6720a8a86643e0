"""`fpo-mlx features` and `fpo-mlx features find`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from fpo_mlx.cli.help import Group
from fpo_mlx.cli.options import (
    PATH,
    READ,
    READING,
    claims,
    csv_option,
    gather,
    json_option,
    labels_option,
    overwrite_option,
    pairs_looked_at,
    preset_option,
    put,
    settings,
    write_csv,
    write_json,
)
from fpo_mlx.cli.show import Bar, Steps, feature_name, one_line, say, table
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.judge import SORTS
from fpo_mlx.judge.scaling import in_words
from fpo_mlx.records import result_file

examples_option = click.option(
    "--examples", type=click.IntRange(min=0), default=3, show_default=True,
    help="Contexts to show of each feature; 0 for none.",
)  # fmt: skip


@click.group(cls=Group, invoke_without_command=True)
@preset_option
@settings(DataConfig, ReferenceConfig, Objective, "init_adapter", "reference")
@click.option("--adapter-path", type=READ, help="Adapter whose changes are looked at.")
@pairs_looked_at("valid")
@click.option(
    "--top", type=click.IntRange(min=1), default=20, show_default=True, help="Features to show."
)
@click.option(
    "--sort", type=click.Choice(SORTS), default="share_of_d", show_default=True,
    help="What moved most means.",
)  # fmt: skip
@examples_option
@labels_option
@click.option(
    "--scaling", is_flag=True,
    help="Test by latent scaling which features really moved; runs both models once more.",
)  # fmt: skip
@json_option
@csv_option
@overwrite_option
@claims(json_path="--json", csv_path="--csv")
def features(
    adapter_path, split, limit, top, sort, examples, labels, scaling, json_path, csv_path, **values
) -> None:
    """Say which SAE features an adapter moved, and where they fire.

    \b
    Example:
      fpo-mlx features --model M --sae S --data pairs/ --adapter-path adapters
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    from fpo_mlx import pipeline

    if not adapter_path:
        raise ConfigError("--adapter-path is missing: without one no feature has moved.")
    report = pipeline.features(
        gather(values), adapter_path=adapter_path, split=split, limit=limit, top=top, sort=sort,
        examples=examples, labels=labels, scaling=scaling, say=say, progress=Bar("reference"),
        count=Steps("pairs"),
    )  # fmt: skip
    columns = ("chosen before", "after", "rejected before", "after", "change", "effect", "of D")
    rows: list[list[Any]] = [["feature", *columns, *(["moved"] if scaling else []), "label"]]
    for c in report.changes:
        figures = (c.chosen_before, c.chosen_after, c.rejected_before, c.rejected_after, c.change)
        cells = [f"{v:.4g}" for v in figures] + [f"{c.effect_size:.2f}", f"{c.share_of_d:.1%}"]
        if c.scaling is not None:
            cells.append(in_words(c.scaling))
        rows.append([feature_name(c.sae, c.feature), *cells, c.label or c.link])
    click.echo(f"{report.pairs} pairs, mean D {', '.join(f'{d:.4g}' for d in report.distance)}")
    table(rows)
    _examples(report.changes)
    write_json(json_path, report.as_dict())
    write_csv(csv_path, report.rows())


@features.command()
@settings(
    "model", "sae", "layer", "site", *READING, "trust_remote_code", "max_seq_length",
    "chat_template", "chat_template_args",
)  # fmt: skip
@click.option("--positive", type=PATH, required=True, help="Texts (.jsonl) with what is sought.")
@click.option("--negative", type=PATH, required=True, help="Texts (.jsonl) without it.")
@click.option(
    "--limit", type=click.IntRange(min=2), default=200, show_default=True, help="Texts of each set."
)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Features to find."
)
@click.option(
    "--held-out", type=click.FloatRange(0, 0.5), default=0.2, show_default=True,
    help="Share of the texts that is not chosen from, but judged on.",
)  # fmt: skip
@click.option(
    "--weight", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="Weight to write for the features that were found.",
)  # fmt: skip
@click.option("--output", type=PATH, help="Feature weights to write: .json, .yaml or .csv.")
@examples_option
@labels_option
@json_option
@overwrite_option
@claims(output="--output", json_path="--json")
def find(
    positive, negative, limit, top, held_out, weight, output, examples, labels, json_path, **values
) -> None:
    """Find the features that tell two sets of texts apart, for --feature-weights.

    \b
    Example:
      fpo-mlx features find --model M --sae S --output weights.json \\
        --positive lists.jsonl --negative prose.jsonl
    """
    from fpo_mlx import pipeline

    _check_output(output)
    found = pipeline.find_features(
        gather(values), positive=positive, negative=negative, limit=limit, top=top,
        held_out=held_out, examples=examples, labels=labels, say=say,
    )  # fmt: skip
    if found:
        _show_found(found)
    rows = [{"weight": weight, **dataclasses.asdict(one)} for one in found]
    write_json(json_path, result_file("features find", {"found": rows}))
    if not found:
        nothing = "no feature fires more on the positive texts"
        if output is None:
            say(nothing)
            return
        raise DataError(
            f"{nothing}; {output} was not written. Give more texts, or such that differ in one "
            "thing only."
        )
    if output is not None:
        from fpo_mlx.data.feature_files import write_weights

        plain = [{k: v for k, v in row.items() if k != "contexts"} for row in rows]
        put(output, lambda name: write_weights(name, plain))


def _show_found(found: Sequence[Any]) -> None:
    names = ("feature", "AUC", "held out", "mean", "elsewhere", "token", "elsewhere", "label")
    cells = [
        [feature_name(f.sae, f.feature), *(_short(v) for v in _figures(f)), f.label or f.link]
        for f in found
    ]
    table([names, *cells])
    _examples(found)


def _check_output(output: Path | None) -> None:
    if output is not None and output.suffix.lower() not in (".json", ".yaml", ".yml", ".csv"):
        raise ConfigError(f"--output {output}: wanted a name in .json, .yaml, .yml or .csv.")


def _figures(f: Any) -> tuple[Any, ...]:
    means = (f.positive, f.negative, f.positive_token, f.negative_token)
    return (f.auc, f.held_out_auc, *means)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _examples(rows: Iterable[Any]) -> None:
    """Where each feature fires most, one line a context."""
    for row in rows:
        for context in row.contexts:
            name, text = feature_name(row.sae, row.feature), one_line(context.text)
            click.echo(f"{name:>8} {context.activation:>8.4g}  {text}  ({context.where})")
