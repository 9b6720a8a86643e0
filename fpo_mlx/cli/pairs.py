"""`fpo-mlx pairs generate | judge | rate | build`: from prompts to preference pairs."""

from __future__ import annotations

import dataclasses

import click

from fpo_mlx.cli.options import PATH, json_option, section_options, write_json
from fpo_mlx.cli.show import say
from fpo_mlx.pairs.settings import GenerateConfig, load


@click.group()
def pairs() -> None:
    """Make preference pairs from prompts: answer, judge or rate, build.

    \b
    Example:
      fpo-mlx pairs generate --model M --prompts prompts.txt --output candidates.jsonl
    """


@pairs.command()
@section_options(GenerateConfig)
@click.option(
    "--output", type=PATH, default="candidates.jsonl", show_default=True, help="File to write to."
)
@json_option
def generate(config, output, json_path, **values) -> None:
    """Answer every prompt several times. A run that was stopped goes on where it was.

    \b
    Example:
      fpo-mlx pairs generate --model M --prompts prompts.txt --n 4 --output candidates.jsonl
    """
    from fpo_mlx import pipeline

    settings = load(GenerateConfig, values, config)
    done = pipeline.pairs_generate(settings, output=output, say=say, progress=_Answers())
    write_json(json_path, dataclasses.asdict(done))
    if done.cut:
        say(
            f"{done.cut} of {done.answers} answers were cut at --max-tokens {settings.max_tokens}; "
            "`pairs build` leaves them out"
        )
    click.echo(
        f"{done.answers} answers to {done.prompts} prompts in {done.seconds:.0f} s, "
        f"{done.before} prompts were there already; in {output}"
    )


class _Answers:
    """A bar on a terminal: answers so far and their rate."""

    def __init__(self) -> None:
        self._bar = None

    def __call__(self, done: int, rate: float) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc="answers", unit="answer", disable=None, leave=False)
        self._bar.update(done - self._bar.n)
