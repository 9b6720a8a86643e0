"""`fpo-mlx rounds`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    claims,
    config_option,
    json_option,
    overwrite_json_option,
    write_json,
)
from fpo_mlx.cli.show import Whole, say, table
from fpo_mlx.cli.train import on_signal_within
from fpo_mlx.config import load_section
from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.settings import RoundsConfig


@click.command(cls=Command)
@config_option
@json_option
@overwrite_json_option
@claims(json_path="--json")
def rounds(config, json_path) -> None:
    """Answer, judge, build and train, round after round.

    Each round answers with the adapter of the round before. Held-out prompts are answered in every
    round and judged against the round before; the rounds end where nothing is won any more. A run
    that was stopped goes on where it was; what nothing was made with yet may be changed.

    \b
    Example:
      fpo-mlx rounds -c rounds.yaml
    """
    from fpo_mlx import pipeline

    if config is None:
        raise ConfigError("--config is missing: give the YAML file that describes the rounds.")
    found = pipeline.rounds(config, say=say, show=Whole(), stopping=on_signal_within)
    root = Path(load_section(RoundsConfig, {}, config).output)
    table(
        [
            ("round", "pairs", "chosen", "rejected", "longer", "tokens", "drift", "wins", "95 %"),
            *(
                (one.number, one.pairs, one.score_chosen, one.score_rejected,
                 "-" if one.longer_share is None else one.longer_share, one.tokens,
                 "-" if one.drift is None else one.drift, one.win_rate, list(one.interval))
                for one in found
            ),
        ]
    )  # fmt: skip
    page = pipeline.rounds_report(root, say)
    click.echo(_best(root, found[-1].number, found[-1].lost))
    if page:
        click.echo(f"all rounds on one page in {page}")
    write_json(json_path, [asdict(one) for one in found])


def _best(root: Path, last: int, lost: bool) -> str:
    """Where the adapters are that are worth taking; a last round that lost has none."""
    if not lost:
        return f"the last adapters in {root}/round-{last}/adapters"
    if last == 1:
        return f"the model itself is the better one; what lost to it is in {root}/round-1/adapters"
    return f"the better adapters in {root}/round-{last - 1}/adapters; round {last} lost to them"
