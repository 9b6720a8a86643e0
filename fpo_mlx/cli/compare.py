"""`fpo-mlx compare`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    READ,
    adapter_scale_option,
    claims,
    gather,
    gather_sampling,
    overwrite_option,
    sampling_options,
    settings,
    some_options,
    write_json,
    write_text,
)
from fpo_mlx.cli.show import Steps, end_of, padded, printable, say, wrapped
from fpo_mlx.config import CompareSampling, DataConfig, load_section
from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.settings import JudgeConfig

NARROWEST = 28  # columns that are narrower than this stand below each other


@click.command(cls=Command)
@settings("model", "trust_remote_code", DataConfig, "init_adapter")
@click.option(
    "--adapter-path", type=READ, multiple=True, help="Adapter to answer with; repeatable."
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeatable.")
@click.option(
    "--prompts", "prompts_file", type=PATH,
    help="File of prompts: one per line, or rows with a `prompt` (.jsonl, .csv …).",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(["train", "valid", "test"]), default="valid", show_default=True,
    help="Part of --data to take prompts from, where none are given.",
)  # fmt: skip
@click.option(
    "--count", type=click.IntRange(min=1),
    help="Prompts to take from --prompts or --data. [default: all of a file, 5 of --data]",
)  # fmt: skip
@adapter_scale_option
@sampling_options(CompareSampling)
@click.option(
    "--reward", type=READ,
    help="Count how often each adapter beats the base by it: one of `pairs judge`.",
)  # fmt: skip
@some_options(JudgeConfig, "timeout", "memory_gb")
@click.option("--output", type=PATH, help="Write the answers here: .json or .md.")
@overwrite_option
@claims(output="--output")
def compare(
    adapter_path, adapter_scale, prompts, prompts_file, split, count, reward, timeout, memory_gb,
    output, **values,
) -> None:  # fmt: skip
    """Answer prompts with the base and with adapters, side by side.

    Each takes its likeliest tokens; with --temp 1 they draw, all with the same noise.

    \b
    Example:
      fpo-mlx compare --model M --adapter-path adapters --prompt "Why do cats purr?"
    """
    from fpo_mlx import pipeline

    if output is not None and output.suffix.lower() not in (".json", ".md"):
        raise ConfigError(f"--output {output}: wanted a name that ends in .json or .md.")
    if not adapter_path:
        raise ConfigError("--adapter-path is missing: there is nothing to compare the base with.")
    judge = _judge(reward, timeout=timeout, memory_gb=memory_gb)
    sampling = gather_sampling(values, CompareSampling)
    result = pipeline.compare(
        gather(values), adapter_paths=adapter_path, scale=adapter_scale, prompts=prompts,
        prompts_file=prompts_file, split=split, count=count, sampling=sampling,
        judge=judge, say=say, progress=Steps("answers"),
    )  # fmt: skip
    width = shutil.get_terminal_size((100, 24)).columns
    for i, prompt in enumerate(result.prompts):
        for line in shown(prompt, result.told(i), width):
            click.echo(line)
    if cut := sum(map(sum, result.cut.values())):
        most = result.sampling.max_tokens
        say(f"cut after {most} tokens, by --max-tokens or the model's positions: {cut} answers")
    for name, one in result.wins.items():
        low, high = one.interval
        click.echo(
            f"{printable(name)} against the base by {reward}: {one.wins} wins, {one.ties} ties, "
            f"{one.losses} losses, {one.rate:.0%} [{low:.0%}, {high:.0%}]"
        )
    _write(output, result)


def _judge(reward: str | None, **limits: float | None) -> JudgeConfig | None:
    """Raises: ConfigError where a limit has no reward, or cannot be one."""
    if reward:
        return load_section(JudgeConfig, {"reward": reward, **limits})
    for name, limit in limits.items():
        if limit is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {limit:g}: found no reward that it is of; add --reward.")
    return None


def _write(output: Path | None, result: Any) -> None:
    if output is None:
        return
    if output.suffix.lower() == ".json":
        write_json(output, result.as_dict())
    else:
        write_text(output, result.markdown())


def shown(prompt: str, answers: Mapping[str, str], width: int) -> Iterator[str]:
    """One prompt and its answers: columns where they are wide enough, else one after the other."""
    yield "=" * width
    yield from _wrapped(prompt, width)
    yield "-" * width
    column = (width - 2 * (len(answers) - 1)) // len(answers)
    if column < NARROWEST:
        for name, text in answers.items():
            yield f"[{name}]"
            yield from _wrapped(text, width)
        return
    blocks = [
        [f"[{end_of(name, column - 2)}]", *_wrapped(text, column)] for name, text in answers.items()
    ]
    for parts in itertools.zip_longest(*blocks, fillvalue=""):
        yield "  ".join(padded(part, column) for part in parts).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    lines = printable(text).strip().splitlines() or ["(nothing)"]
    return [part for line in lines for part in wrapped(line, width)]
