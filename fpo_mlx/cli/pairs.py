"""`fpo-mlx pairs generate | judge | rate | build`: from prompts to preference pairs."""

from __future__ import annotations

import dataclasses

import click

from fpo_mlx.cli.help import Group
from fpo_mlx.cli.options import (
    PATH,
    READ,
    claims,
    json_option,
    overwrite_json_option,
    overwrite_option,
    section_options,
    write_json,
)
from fpo_mlx.cli.pairs_look import check, plan, show_judges
from fpo_mlx.cli.show import Steps, say
from fpo_mlx.config import load_section
from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.settings import BuildConfig, GenerateConfig, JudgeConfig


@click.group(cls=Group)
def pairs() -> None:
    """Make preference pairs from prompts: answer, judge or rate, build.

    \b
    Example:
      fpo-mlx pairs generate --model M --prompts p.txt --output candidates.jsonl
    """


@pairs.command()
@section_options(GenerateConfig)
@click.option(
    "--output", type=PATH, default="candidates.jsonl", show_default=True, help="File to write to."
)
@json_option
@overwrite_json_option
@claims(json_path="--json", grows={"output": "--output"})
def generate(config, output, json_path, **values) -> None:
    """Answer every prompt several times. A run that was stopped goes on where it was.

    \b
    Example:
      fpo-mlx pairs generate --model M --prompts p.txt --output candidates.jsonl
    """
    from fpo_mlx import pipeline

    settings = load_section(GenerateConfig, values, config)
    done = pipeline.pairs_generate(settings, output=output, say=say, progress=_Answers())
    if done.cut:
        say(
            f"{done.cut} of {done.answers} answers were cut at --max-tokens {settings.max_tokens}; "
            "`pairs build` leaves them out"
        )
    click.echo(
        f"{done.answers} answers to {done.prompts} prompts in {done.seconds:.0f} s, "
        f"{done.before} prompts were there already; in {output}"
    )
    write_json(json_path, dataclasses.asdict(done))


@pairs.command()
@click.argument("candidates", type=PATH)
@section_options(JudgeConfig)
@click.option(
    "--output", type=PATH, default="verdicts.jsonl", show_default=True, help="File to write to."
)
@click.option("--against", type=PATH, help="A person's votes to compare the judge with.")
@json_option
@overwrite_json_option
@claims(json_path="--json", grows={"output": "--output"})
def judge(candidates, config, output, against, json_path, **values) -> None:
    """Let a model, an endpoint or a reward function say which answers are better.

    A model sees each two answers in both orders; where its verdicts differ it is a tie. A run that
    was stopped goes on where it was. Of an endpoint, prompts and answers leave this machine.

    \b
    Example:
      fpo-mlx pairs judge candidates.jsonl --judge mlx-community/Qwen3-8B-4bit
    """
    from fpo_mlx import pipeline

    settings = load_section(JudgeConfig, values, config)
    done = pipeline.pairs_judge(
        settings, candidates=candidates, output=output, against=against, say=say,
        progress=Steps("prompts"),
    )  # fmt: skip
    _show_judges(done.judges)
    if len(done.judges) > 1:
        say(f"this judge is {done.judge}")
    click.echo(f"{done.written} verdicts, {done.before} were there already; in {output}")
    write_json(json_path, done.as_dict())


@pairs.command()
@click.argument("candidates", type=PATH)
@click.option("--verdicts", type=PATH, multiple=True, help="File of verdicts; repeatable.")
@click.option(
    "--reward", type=READ, help="Judge by this reward first: FILE.py:FUNCTION or an example's name."
)
@section_options(BuildConfig)
@click.option(
    "--output", type=PATH, default="pairs", show_default=True, help="Folder to write the pairs to."
)
@json_option
@overwrite_option
@claims(json_path="--json")
def build(candidates, verdicts, reward, config, output, json_path, overwrite, **values) -> None:
    """Choose pairs from judged answers and write them as `train` takes them.

    \b
    Example:
      fpo-mlx pairs build candidates.jsonl --verdicts verdicts.jsonl
    """
    from fpo_mlx import pipeline

    settings = load_section(BuildConfig, values, config)
    if not verdicts and not reward:
        raise ConfigError("--verdicts is missing: give a file of verdicts, or --reward.")
    done = pipeline.pairs_build(
        settings, candidates=candidates, verdicts=verdicts, reward=reward, output=output,
        overwrite=overwrite, say=say,
    )  # fmt: skip
    for reason, count in done.left.items():
        say(f"left out: {count} × {reason}")
    rows = ", ".join(f"{count} {name}" for name, count in done.splits.items() if count)
    share = "-" if done.longer_share is None else f"{done.longer_share:.0%}"
    click.echo(f"{done.pairs} pairs ({rows} rows); the longer answer wins {share}; in {output}")
    write_json(json_path, done.as_dict())


@pairs.command()
@click.argument("candidates", type=PATH)
@click.option(
    "--output", type=PATH, default="votes.jsonl", show_default=True, help="File to write to."
)
@click.option(
    "--per-prompt", type=click.IntRange(min=1), default=1, show_default=True,
    help="Comparisons per prompt.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of sides and repeats.")
@click.option("--keep-cut", is_flag=True, help="Show answers that ended by length, too.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port of the page.  [default: any]"
)
@click.option("--browser/--no-browser", default=True, help="Open the page.  [default: on]")
@claims(grows={"output": "--output"})
def rate(candidates, output, per_prompt, seed, keep_cut, port, browser) -> None:
    """Choose the better answers yourself, on a page in your browser.

    The page is on this machine only. Every vote is on disk before the next comparison shows, so
    stop whenever you like and start the same command to go on.

    \b
    Example:
      fpo-mlx pairs rate candidates.jsonl --output votes.jsonl
    """
    from fpo_mlx import pipeline

    def opened(address: str) -> None:
        say(f"rate at {address} (Ctrl-C ends)")
        if browser:
            click.launch(address)

    done = pipeline.pairs_rate(
        candidates, output, per_prompt=per_prompt, seed=seed, keep_cut=keep_cut, port=port,
        opened=opened,
    )  # fmt: skip
    again = f"; twice the same {done['same']} of {done['twice']} times" if done["twice"] else ""
    click.echo(f"{done['votes']} votes in {output}{again}")


pairs.add_command(plan)
pairs.add_command(check)


def _show_judges(judges) -> None:
    """Their figures, and what to think of them."""
    show_judges(judges)
    for name, summary in judges.items():
        first = summary.first_share
        if first is not None and not 0.4 <= first <= 0.6:
            say(f"warning: {name} leans to one position ({first:.0%} for the first)")
        if summary.verdicts and summary.unreadable > summary.verdicts / 10:
            say(f"warning: {summary.unreadable} of {name}'s verdicts cannot be read")


class _Answers:
    """A bar on a terminal: answers so far and their rate."""

    def __init__(self) -> None:
        self._bar = None

    def __call__(self, done: int, rate: float) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc="answers", unit="answer", disable=None, leave=False)
        self._bar.update(done - self._bar.n)
