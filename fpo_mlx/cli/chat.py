"""`fpo-mlx chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import TextIOWrapper
from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    READ,
    READING,
    adapter_scale_option,
    gather,
    gather_sampling,
    labels_option,
    sampling_options,
    settings,
)
from fpo_mlx.cli.show import one_line, printable, say
from fpo_mlx.config import ChatSampling
from fpo_mlx.errors import FpoError

COMMANDS = ("/steer", "/reset", "/quit")
HELP = "/steer 812=+4,97=0 steers (alone: ends it), /reset forgets, /quit ends"


@click.command(cls=Command)
@settings(
    "model", "sae", "layer", "site", *READING, "trust_remote_code", "chat_template",
    "chat_template_args", "init_adapter",
)  # fmt: skip
@click.option("--adapter-path", type=READ, multiple=True, help="Adapter that answers; repeatable.")
@click.option("--beside-base", is_flag=True, help="The base answers too, before the adapters.")
@adapter_scale_option
@click.option(
    "--steer", default="",
    help="Features to add (812=+4, in decoder rows) or take out (97=0), with commas.",
)  # fmt: skip
@click.option(
    "--show-features", type=click.IntRange(min=0), default=0, metavar="N",
    help="Show the N strongest features behind each token.",
)  # fmt: skip
@labels_option
@click.option("--system", help="System message of the conversation.")
@click.option("--prompt", "prompts", multiple=True, help="Ask this and end; repeatable.")
@sampling_options(ChatSampling)
def chat(
    adapter_path, beside_base, adapter_scale, steer, show_features, labels, system, prompts,
    **values,
) -> None:  # fmt: skip
    """Talk to a model, its adapters and its features.

    On a terminal, what you type is asked; --prompt asks and ends. /steer, /reset and /quit are
    commands. Models side by side are each in memory, and each has its own conversation.

    \b
    Example:
      fpo-mlx chat --model M --sae S --adapter-path adapters --steer 812=+4
    """
    from fpo_mlx import pipeline

    sampling = gather_sampling(values, ChatSampling)
    talk = pipeline.open_chat(
        gather(values), adapter_paths=adapter_path, scale=adapter_scale, beside_base=beside_base,
        steer=steer, system=system, labels=labels, show=show_features, say=say,
    )  # fmt: skip
    for prompt in prompts or _typed():
        try:
            if _command(talk, prompt):
                continue
            for name in talk.speakers:
                if len(talk.speakers) > 1:
                    click.echo(f"[{name}]")
                said = talk.answer(name, prompt, sampling, show=show_features)
                _print(said, talk.labels, bool(show_features))
                if talk.cut is not None:
                    most = sampling.max_tokens
                    why = f"--max-tokens {most}" if talk.cut == most else "the model's positions"
                    say(f"cut after {talk.cut} tokens, by {why}: the answer is not at its end")
        except FpoError as error:
            if prompts:
                raise
            say(f"fpo-mlx: {error}")


def _typed() -> Iterator[str]:
    """What a person types, until the end of the input."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # arrow keys; macOS takes 1024 bytes without
            import readline  # noqa: F401
        say(HELP)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text ended it
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line


def _command(talk: Any, line: str) -> bool:
    word, _, rest = line.strip().partition(" ")
    if word == "/steer":
        talk.steer(rest)
        say(f"steering {rest}" if rest.strip() else "no steering")
    elif word == "/reset":
        talk.reset()
        say("a new conversation")
    elif word not in COMMANDS and get_close_matches(word.lower(), COMMANDS, 1, 0.8):
        raise FpoError(f"{word}: no such command. {HELP}")
    return word in ("/steer", "/reset")


def _print(said: Iterator[Any], labels: Mapping[int, str], features: bool) -> None:
    """Text as it comes; with features a line per token."""
    for piece, found in said:
        if not features:
            click.echo(printable(piece), nl=False)
            continue
        names = (
            f"{i} {one_line(labels.get(i, ''))}".strip() + f" {value:.3g}" for i, value in found
        )
        click.echo(f"{printable(piece)!r:<16} {'  '.join(names)}".rstrip())
    click.echo()
