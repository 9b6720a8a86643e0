"""Prompts to answer: one per line, or rows of JSON as the data has them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fpo_mlx.errors import DataError
from fpo_mlx.pairs.records import Prompt, parse_prompt
from fpo_mlx.storage import lines


def check_prompts(path: Path) -> int:
    """How many prompts a file holds. Raises: DataError with every line that is none, or without
    any; FpoError where nothing can be read."""
    count, faults = 0, []
    for found in _read(path):
        count += not isinstance(found, DataError)
        faults += [str(found).removesuffix(".")] if isinstance(found, DataError) else []
    if faults or not count:
        what = f": {len(faults)} lines are no prompts" if faults else " holds no prompts"
        raise DataError(
            f"{path}{what}. Wanted one per line, or objects with a `prompt` in a .jsonl file.",
            faults,
        )
    return count


def read_prompts(path: Path) -> Iterator[Prompt]:
    """A .jsonl file of objects with a `prompt`, or a text file of one prompt per line.

    One in memory at a time. Raises: DataError naming the line; FpoError where nothing can be read.
    """
    for found in _read(path):
        if isinstance(found, DataError):
            raise found
        yield found


def _read(path: Path) -> Iterator[Prompt | DataError]:
    rows = path.suffix == ".jsonl"
    for number, _, line in lines.read_lines(path):
        where = f"{path.name}:{number}"
        try:
            record = lines.decode(line, where) if rows else {"prompt": _text(line, where)}
            yield parse_prompt(record, where)
        except DataError as fault:
            yield fault


def _text(line: bytes, where: str) -> str:
    try:
        return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line).") from error


def windows(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """The prompts in lists of `size`."""
    while window := list(islice(prompts, size)):
        yield window
