"""Where pairs come from: a folder of JSON Lines, one file, or a data set on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns, PreferenceRow, RowFault, parse_row
from fpo_mlx.errors import DataError, FpoError

SPLITS = ("train", "valid", "test")

# Names under which hub data sets keep a split, the first that exists wins. UltraFeedback-binarized
# has train_prefs and test_prefs only; a plain "test" is never taken for validation by itself.
_HUB_NAMES = {
    "train": ("train", "train_prefs"),
    "valid": ("valid", "validation", "val", "dev", "eval", "valid_prefs", "test_prefs"),
    "test": ("test", "test_prefs"),
}


@dataclass(frozen=True)
class HubSplits:
    """How a hub data set names its splits; None finds the name. `subset` is its configuration."""

    train: str | None = None
    valid: str | None = None
    test: str | None = None
    subset: str | None = None


AUTO_SPLITS = HubSplits()


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, before anything is made of it."""

    record: Any  # None if it could not be read
    where: str  # "train.jsonl:12", "owner/name[train_prefs]:12"; counted from 1
    index: int  # within its split, from 0
    fault: str = ""  # why it could not be read


def read_split(
    source: str | Path,
    split: str = "train",
    columns: Columns = DEFAULT_COLUMNS,
    hub: HubSplits = AUTO_SPLITS,
) -> list[PreferenceRow]:
    """Read all rows of one split ("train", "valid" or "test").

    source: a folder with train.jsonl, valid.jsonl, test.jsonl; one .jsonl file, which is then the
    split that was asked for; or the id of a data set on the hub.

    Raises DataError (no rows, or rows that cannot be used: all of them are named) and FpoError
    (no such file, folder, data set or split).
    """
    return parse_rows(read_raw(source, split, hub), f"{source} ({split})", columns)


def parse_rows(
    raw: Iterable[RawRow], source: str, columns: Columns = DEFAULT_COLUMNS
) -> list[PreferenceRow]:
    """Raw rows to records, or one DataError that names every row that cannot be used."""
    rows, faults = [], []
    for item in raw:
        try:
            rows.append(parse_raw(item, columns))
        except RowFault as fault:
            faults.append(f"{item.where}: {fault}")
    if faults:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows) + len(faults)} rows cannot be used. Mend them, "
            "or let `fpo-mlx check --fix OUT` write the data without them:",
            faults,
        )
    return rows


def parse_raw(raw: RawRow, columns: Columns = DEFAULT_COLUMNS) -> PreferenceRow:
    """One raw row to a record. Raises RowFault."""
    if raw.fault:
        raise RowFault("unreadable", raw.fault)
    return parse_row(raw.record, columns, raw.where, raw.index)


def read_raw(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> list[RawRow]:
    """All rows of one split, unparsed. Raises DataError (none) and FpoError (no such source)."""
    if split not in SPLITS:
        raise FpoError(f"{split!r} is no split; wanted one of {', '.join(SPLITS)}.")
    found = find_splits(source, hub, want=split)
    if split not in found:
        raise FpoError(_no_split(source, split, found))
    place = found[split]
    rows = list(_file_rows(place) if isinstance(place, Path) else _hub_rows(source, place, hub))
    if not rows:
        raise DataError(
            f"{place if isinstance(place, Path) else f'{source}[{place}]'} holds no rows. "
            "Each line should be an object with prompt, chosen and rejected."
        )
    return rows


def find_splits(
    source: str | Path, hub: HubSplits = AUTO_SPLITS, want: str = "train"
) -> dict[str, Path | str]:
    """The splits that source has: a file for each, or its name on the hub.

    want: the split for which a single file counts (a file is one split, never two).

    Raises FpoError if there is no such file, folder or data set.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {want: path}
    if path.is_dir():
        files = {name: path / f"{name}.jsonl" for name in SPLITS}
        return {name: file for name, file in files.items() if file.is_file()}
    if _looks_like_a_path(str(source)):
        raise FpoError(
            f"{source}: no such file or folder. --data wants a folder with train.jsonl, "
            "a .jsonl file, or the id of a data set on the hub (owner/name)."
        )
    return _hub_splits(str(source), hub)


def _no_split(source: str | Path, split: str, found: dict) -> str:
    have = ", ".join(f"{name} ({place})" for name, place in found.items()) or "none"
    path = Path(source).expanduser()
    if path.is_dir():
        return (
            f"{path / f'{split}.jsonl'}: no such file. Splits found in {source}: {have}. "
            "--data wants a folder with train.jsonl (and valid.jsonl, test.jsonl)."
        )
    return (
        f"{source}: no {split} split; found: {have}. Name it with "
        f"--{split}-split NAME, or pass another data set."
    )


def _looks_like_a_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~", "\\"))
        or source.endswith((".jsonl", ".json", "/"))
        or source.count("/") != 1
        or any(char.isspace() for char in source)
    )


def _file_rows(path: Path) -> Iterator[RawRow]:
    """One row for each line that is not blank. A line that cannot be read becomes a fault."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FpoError(f"{path}: cannot be read: {error.strerror or error}.") from error
    index = 0
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        record, fault = _decode(line)
        yield RawRow(record, f"{path.name}:{number}", index, fault)
        index += 1


def _decode(line: bytes) -> tuple[Any, str]:
    """The value of one line of JSON, or why there is none."""
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at character {error.pos + 1}"
    except ValueError:
        return None, "not JSON: a number with too many digits"
    except RecursionError:
        return None, "not JSON: nested too deeply"


def _hub_splits(source: str, hub: HubSplits) -> dict[str, Path | str]:
    from datasets import get_dataset_split_names

    try:
        names = get_dataset_split_names(source, hub.subset)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FpoError(_hub_trouble(source, error)) from error
    found: dict[str, Path | str] = {}
    for split in SPLITS:
        asked = getattr(hub, split)
        wanted = (asked,) if asked else _HUB_NAMES[split]
        name = next((name for name in wanted if name in names), None)
        if name is not None:
            # rows that were looked at in training are no test, unless somebody says so
            if asked or name not in found.values():
                found[split] = name
        elif asked:
            raise FpoError(
                f"{source}: no split {asked!r} (--{split}-split); it has {', '.join(names)}."
            )
    if not found:
        raise FpoError(
            f"{source}: none of its splits ({', '.join(names)}) has a name that is known here. "
            "Name them with --train-split and --valid-split."
        )
    return found


def _hub_rows(source: str | Path, name: str, hub: HubSplits) -> Iterator[RawRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(str(source), hub.subset, split=name)
        for index, record in enumerate(rows):
            yield RawRow(record, f"{source}[{name}]:{index + 1}", index)
    except Exception as error:  # see _hub_splits
        raise FpoError(_hub_trouble(str(source), error)) from error


def _hub_trouble(source: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{source}: no such file or folder here, and as a data set on the hub it cannot be read: "
        f"{lines[0][:300]}. Check the name and the network, log in with `hf auth login` if it is "
        "private, or pass a folder with train.jsonl."
    )
