"""`fpo-mlx features data`: what the pairs teach."""

from __future__ import annotations

from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    claims,
    csv_option,
    gather,
    json_option,
    labels_option,
    overwrite_option,
    pairs_looked_at,
    put,
    settings,
    write_csv,
    write_json,
)
from fpo_mlx.cli.show import Bar, feature_name, one_line, say, table
from fpo_mlx.config import DataConfig, ReferenceConfig
from fpo_mlx.errors import DataError
from fpo_mlx.pipeline import DataAsked

SHARE = click.FloatRange(0, 1, min_open=True)


@click.command("data", cls=Command)
@settings(DataConfig, ReferenceConfig, "top_k", "init_adapter", "reference")
@pairs_looked_at("train")
@click.option(
    "--rate", type=SHARE, default=DataAsked.rate, show_default=True,
    help="Rate of false discoveries among the features that are shown.",
)  # fmt: skip
@click.option(
    "--folds", type=click.IntRange(min=2), default=DataAsked.folds, show_default=True,
    help="Parts of the cross-validation; a prompt is never in two.",
)  # fmt: skip
@click.option(
    "--top", type=click.IntRange(min=1), default=20, show_default=True, help="Features to show."
)
@click.option(
    "--examples", type=click.IntRange(min=0), default=DataAsked.examples, show_default=True,
    help="Pairs for and against to show of each feature.",
)  # fmt: skip
@click.option(
    "--contexts", is_flag=True, help="Let the model read the examples, to show the tokens."
)
@labels_option
@click.option(
    "--doubles", type=SHARE, default=DataAsked.doubles, show_default=True,
    help="Cosine of the features from which two pairs are near doubles.",
)  # fmt: skip
@click.option(
    "--against", type=SHARE, default=DataAsked.against, show_default=True,
    help="A row goes against the trend where its label is less likely than this.",
)  # fmt: skip
@click.option("--select", type=click.IntRange(min=1), help="Rows of a covering subset to write.")
@click.option("--drop-against", is_flag=True, help="Write no rows that go against the trend.")
@click.option("--output", type=PATH, help="Folder to write the chosen rows to.")
@click.option("--save-reward", type=PATH, help="Write the regression, for pairs judge --reward.")
@json_option
@csv_option
@overwrite_option
@claims(json_path="--json", csv_path="--csv", save_reward="--save-reward")
def data(top, json_path, csv_path, save_reward, overwrite, **values) -> None:
    """Say what the pairs reward, from the reference's cached features.

    Which features of an answer predict that it is the chosen one, beside its length; which rows go
    against that, and may be labelled wrong; which are near doubles.

    \b
    Example:
      fpo-mlx features data --model M --sae S --data pairs/ --reference ref/
    """
    from fpo_mlx import pipeline

    names = DataAsked.__dataclass_fields__
    asked = DataAsked(
        **{name: values.pop(name) for name in list(values) if name in names},
        reward=save_reward is not None, overwrite=overwrite,
    )  # fmt: skip
    config = gather(values)
    report = pipeline.features_data(config, asked, say=say, progress=Bar("reference"))
    _show(report, top)
    try:
        report = pipeline.write_chosen(config, asked, report, say)
    finally:  # what took long is kept where the rows cannot be written
        write_json(json_path, report.as_dict())
        write_csv(csv_path, report.rows())
        if (reward := report.reward) is not None:
            put(save_reward, lambda name: pipeline.write_reward(name, reward))
    if report.written == 0:
        raise DataError(
            f"--drop-against leaves no row at --against {asked.against:g}; {asked.output} was not "
            "written. Give a lower --against."
        )
    if report.written is not None:
        click.echo(f"{report.written} rows in {asked.output}")


def _show(report: Any, top: int) -> None:
    found = report.lessons
    click.echo(f"{found.pairs} pairs; {found.tested} features tested; {in_words(found)}")
    table([("told apart by", "held out", "95 %", "log loss", "explained"), *(
        (p.name, f"{p.accuracy:.1%}", f"{p.ci95[0]:.1%} … {p.ci95[1]:.1%}", f"{p.log_loss:.4f}",
         f"{p.explained:.1%}")
        for p in found.predictors
    )])  # fmt: skip
    click.echo()
    rows: list[Any] = [
        ("feature", "z", "q", "effect", "wins", "explains", "own", "goes with", "label")
    ]
    for one in found.found[:top]:
        other = f"as {feature_name(*one.follows)}" if one.follows else ""
        rows.append(
            (feature_name(one.sae, one.feature), f"{one.z:+.1f}", f"{one.q:.1g}",
             f"{one.effect_size:+.2f}", f"{one.win_rate:.0%}", f"{one.explained:.1%}",
             "yes" if one.own else other,
             " ".join(repr(word) for word in one.words[:4]), one.label or one.link)
        )  # fmt: skip
    table(rows)
    for one in found.found[:top]:
        _examples(one)
    _rows(report, top)


def in_words(found: Any) -> str:
    """ "your pairs reward: …" """
    parts = [
        f"{feature_name(one.sae, one.feature)} {(one.label or ' '.join(one.words[:2])).strip()} "
        f"({'+' if one.z > 0 else '−'})"
        for one in found.found
        if one.own
    ]
    if abs(found.length_z) > 3:  # 1 in 400 by chance
        parts.append(f"length ({'+' if found.length_z > 0 else '−'})")
    return "your pairs reward: " + (one_line(", ".join(parts)) or "nothing that is seen here")


def _examples(one: Any) -> None:
    name = feature_name(one.sae, one.feature)
    for kind, examples in (("for", one.examples), ("against", one.against)):
        for e in examples:
            click.echo(
                f"{name:>8} {kind:>7}  {e.chosen:.3g} / {e.rejected:.3g}  {e.where}, {e.side}: "
                f"{one_line(e.text)}"
            )
    for context in one.contexts:
        text = one_line(context.text)
        click.echo(f"{name:>8} {context.activation:>8.4g}  {text}  ({context.where})")


def _rows(report: Any, top: int) -> None:
    where, probability = report.where, report.lessons.probability
    click.echo(f"{len(report.against)} rows go against the trend")
    for i in report.against[:top]:
        click.echo(f"  {where[i]}: its label has a probability of {probability[i]:.3f}")
    click.echo(f"{len(report.doubles)} near doubles")
    for i, j, cosine in report.doubles[:top]:
        click.echo(f"  {where[i]} and {where[j]}: cosine {cosine:.3f}")
