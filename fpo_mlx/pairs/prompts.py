"""Prompts to answer: one per line, or rows of JSON as the data has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fpo_mlx.data import containers
from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.findings import topic_of_turns
from fpo_mlx.data.layouts import filled
from fpo_mlx.errors import DataError, FpoError
from fpo_mlx.pairs.records import Prompt, parse_prompt


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
            f"{path}{what}. Wanted one per line, or rows with a `prompt` (.jsonl, .json, .csv …).",
            faults,
        )
    return count


def shared_prompts(path: Path, other: Path) -> tuple[int, int]:
    """How many prompts of `path` are in `other` as well, and how many there are: different ones,
    told apart as a share of the rows tells them. Raises: as `read_prompts`."""
    own, others = (
        {topic_of_turns(prompt.turns) for prompt in read_prompts(one)} for one in (path, other)
    )
    return len(own & others), len(own)


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Rows with a `prompt` of a file of data, by its name, or a text file of one prompt per line.

    One in memory at a time where there is one a line. Raises: DataError naming the line, or where
    nothing can be read.
    """
    for found in _read(path):
        if isinstance(found, DataError):
            raise found
        yield found


def _read(path: Path) -> Iterator[Prompt | DataError]:
    if not path.is_file():
        raise FpoError(f"{path}: cannot be read: no such file.")
    is_data = containers.stem(path.with_name(path.name.lstrip("."))) is not None
    rows = containers.file_rows(path) if is_data else _texts(path)
    for row in rows:
        try:
            yield parse_prompt(_record(row), row.where)
        except DataError as fault:
            yield fault


def _texts(path: Path) -> Iterator[RawRow]:
    """Each line that is not blank, the last one too where nothing ends it."""
    for number, line in containers.text_lines(path):
        where, record, fault = f"{path.name}:{number}", None, ""
        try:
            record = {"prompt": line.decode("utf-8").strip()}
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 (byte {error.start + 1} of the line)"
        if fault or record != {"prompt": ""}:
            yield RawRow(record, where, number - 1, fault)


def _record(row: RawRow) -> Mapping[str, Any]:
    if not isinstance(row.record, Mapping):
        what = row.fault or f"wanted an object, found {type(row.record).__name__}"
        raise DataError(f"{row.where}: {what}.")
    return {str(n): v for n, v in row.record.items() if n == "prompt" or filled(v)}


def windows(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """The prompts in lists of `size`."""
    while window := list(islice(prompts, size)):
        yield window
