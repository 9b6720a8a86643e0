"""Prompts to answer: one per line, or rows of JSON as the data has them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fpo_mlx.errors import DataError
from fpo_mlx.pairs.records import Prompt, parse_prompt
from fpo_mlx.storage import lines


def read_prompts(path: Path) -> Iterator[Prompt]:
    """A .jsonl file of objects with a `prompt`, or a text file of one prompt per line.

    One in memory at a time. Raises: DataError naming the line; FpoError where nothing can be read.
    """
    rows = path.suffix == ".jsonl"
    for number, _, line in lines.read_lines(path):
        where = f"{path.name}:{number}"
        if rows:
            yield parse_prompt(lines.decode(line, where), where)
            continue
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line).") from error
        yield parse_prompt({"prompt": text}, where)


def windows(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """The prompts in lists of `size`."""
    while window := list(islice(prompts, size)):
        yield window
