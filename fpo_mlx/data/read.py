"""Where pairs come from: a folder of data files, one file, or a data set on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpo_mlx.data.containers import FORMATS, RawRow, digest, file_rows, stem
from fpo_mlx.data.documents import record_of
from fpo_mlx.data.folders import Unclear, named_files, one_place
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns, PreferenceRow, parse_row
from fpo_mlx.data.tokenize import refusal
from fpo_mlx.errors import ConfigError, DataError, FpoError

SPLITS = ("train", "valid", "test")

# Names under which data sets keep a split. UltraFeedback-binarized
# has train_prefs and test_prefs only; a plain "test" is never taken for validation by itself.
_NAMES = {
    "train": ("train", "train_prefs", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval", "valid_prefs", "validation_prefs",
              "eval_prefs", "evaluation", "test_prefs"),
    "test": ("test", "test_prefs", "testing"),
}  # fmt: skip

_SLICE = re.compile(r"(.+)\[(?:-?\d+%?)?:(?:-?\d+%?)?\]")  # as `datasets` takes it: train[:1000]

# A file, the parts of one, a folder that `datasets` saved, or a split's name on the hub
Place = Path | tuple[Path, ...] | str


@dataclass(frozen=True)
class HubSplits:
    """How a data set names its splits; None finds the name. `subset` is its configuration.

    valid_share: of the training prompts, for validation; nothing here heeds it, `holdout` does.
    """

    train: str | None = None
    valid: str | None = None
    test: str | None = None
    subset: str | None = None
    valid_share: float = 0.0


AUTO_SPLITS = HubSplits()


def parse_rows(
    raw: Iterable[RawRow], source: str, columns: Columns = DEFAULT_COLUMNS
) -> list[PreferenceRow]:
    """Raw rows to records, or one DataError that names every row that cannot be used."""
    rows: list[PreferenceRow] = []
    faults: list[tuple[str, RowFault]] = []
    for item in raw:
        try:
            rows.append(parse_raw(item, columns))
        except RowFault as fault:
            faults.append((item.where, fault))
    if faults:
        raise refusal(source, faults, len(rows) + len(faults))
    return rows


def parse_raw(raw: RawRow, columns: Columns = DEFAULT_COLUMNS) -> PreferenceRow:
    """One raw row to a record. Raises RowFault."""
    return parse_row(record_of(raw), columns, raw.where, raw.index)


def iterate_raw(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> Iterator[RawRow]:
    """All rows of one split, unparsed, one by one: a large set need not be in memory at once.

    Raises DataError (no rows) and FpoError (no such source).
    """
    place = find_place(source, split, hub)
    some = False
    for row in _rows_of(source, place, hub):
        some = True
        yield row
    if not some:
        raise DataError(
            f"{_shown(source, place)} holds no rows. "
            "Each line should be an object with prompt, chosen and rejected."
        )


def content_key(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> str:
    """sha256 of what a split holds and how its rows are called: equal for equal rows.

    Raises as `iterate_raw`.
    """
    place = find_place(source, split, hub)
    if isinstance(place, str):
        parts = [str(source), place, str(hub.subset), _hub_table(source, place, hub)._fingerprint]
    else:
        parts = [text for path in _files(place) for text in (path.name, digest(path))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_place(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> Place:
    """Where a split lies.

    Raises FpoError if there is no such source or split, or no telling which files are meant.
    """
    if split not in SPLITS:
        raise FpoError(f"{split!r} is no split; wanted one of {', '.join(SPLITS)}.")
    found = find_splits(source, hub, want=split)
    if split not in found:
        raise FpoError(_no_split(source, split, found))
    place = found[split]
    if isinstance(place, Unclear):
        raise FpoError(place.why)
    return place


def find_splits(
    source: str | Path, hub: HubSplits = AUTO_SPLITS, want: str = "train"
) -> Mapping[str, Place | Unclear]:
    """The splits that source has, and where each lies; `Unclear` is refused where it is read.

    want: the split for which a single file counts (a file is one split, never two).

    Raises FpoError if there is no such file, folder or data set.
    """
    path = Path(source).expanduser()
    if path.exists() and hub.subset:
        raise ConfigError(
            f"--subset {hub.subset}: {source} is on this disk, and subsets are the configurations "
            "of a data set on the hub. Leave it out, or name the folder of that part."
        )
    if path.is_file():
        return _one_split(path, hub, want)
    if path.is_dir():
        return _folder_splits(path, hub, want)
    if _looks_like_a_path(str(source)):
        raise FpoError(
            f"{source}: no such file or folder. --data wants a folder with train.jsonl, "
            "a .jsonl file, or the id of a data set on the hub (owner/name)."
        )
    return _hub_splits(str(source), hub)


def _one_split(path: Path, hub: HubSplits, want: str) -> dict[str, Place | Unclear]:
    """Raises ConfigError where the user names a split of it."""
    for split in SPLITS:
        if name := getattr(hub, split):
            raise ConfigError(
                f"--{split}-split {name}: {path} is one split by itself and has no others. Leave "
                "it out, or pass a folder or a data set on the hub that has this split."
            )
    return {want: path}


def _folder_splits(folder: Path, hub: HubSplits, want: str) -> dict[str, Place | Unclear]:
    """Splits by the names of files (parts of one in their order), or of folders that hold them."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _one_split(folder, hub, want)  # datasets' save_to_disk
    groups = named_files(folder)
    places = {name: one_place(name, group) for name, group in groups.items()}
    found = _named(str(folder), places, hub)
    alone = [name for name, group in groups.items() if group[0].parent == folder]
    if not found and len(alone) == 1:
        return {"train": places[alone[0]]}
    return found


def _named(
    source: str, places: Mapping[str, Place | Unclear], hub: HubSplits
) -> dict[str, Place | Unclear]:
    """Which of the named places is which split. Raises FpoError for a name that is not there."""
    found: dict[str, Place | Unclear] = {}
    for split in SPLITS:
        asked = getattr(hub, split)
        wanted = (asked, asked.lower()) if asked else _NAMES[split]
        names = [name for name in wanted if name in places]
        if asked and not names:
            raise FpoError(
                f"{source}: no split {asked!r} (--{split}-split); it has {', '.join(places)}."
            )
        if not asked:  # rows that were looked at in training are no test, unless somebody says so
            names = [name for name in names if places[name] not in found.values()]
        if names:
            two = None if asked else _two_names(source, split, names)
            found[split] = two or places[names[0]]
    return found


def _two_names(source: str, split: str, names: list[str]) -> Unclear | None:
    """Where more than one name is this split's: nothing says which is meant."""
    if split == "valid":  # beside one of its own, test_prefs is the test
        names = [name for name in names if name not in _NAMES["test"]]
    if len(names) < 2:
        return None
    return Unclear(
        f"{source}: found {' and '.join(names)}, each a name of the {split} split, wanted one. "
        f"Choose with --{split}-split, or keep one of them there."
    )


def _no_split(source: str | Path, split: str, found: Mapping[str, Place | Unclear]) -> str:
    have = ", ".join(f"{name} ({_shown(source, at)})" for name, at in found.items()) or "none"
    path = Path(source).expanduser()
    if path.is_dir():
        return (
            f"{path / f'{split}.jsonl'}: no such file. Splits found in {source}: {have}. "
            "--data wants a folder with train.jsonl (and valid.jsonl, test.jsonl), or the same in "
            f"another form ({', '.join(FORMATS[2:])}, packed or in numbered parts)."
        )
    return (
        f"{source}: no {split} split; found: {have}. Name it with "
        f"--{split}-split NAME, or pass another data set."
    )


def _shown(source: str | Path, place: Place | Unclear) -> str:
    if isinstance(place, Unclear):
        return "several"
    if isinstance(place, tuple):
        return f"{place[0]} and {len(place) - 1} more"
    return str(place) if isinstance(place, Path) else f"{source}[{place}]"


def _looks_like_a_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~", "\\"))
        or source.endswith("/")
        or stem(Path(source)) is not None
        or source.count("/") != 1
        or any(char.isspace() for char in source)
    )


def _files(place: Path | tuple[Path, ...]) -> list[Path]:
    if isinstance(place, tuple):
        return list(place)
    return _saved_files(place) if place.is_dir() else [place]


def _saved_files(folder: Path) -> list[Path]:
    """The files that `save_to_disk` wrote; beside them lie those of a later `map` or `filter`."""
    state = folder / "state.json"
    try:
        names = [str(one["filename"]) for one in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "it does not say which files hold the rows"
        raise DataError(f"{state}: {what}. Save the data set again.") from error
    return [folder / name for name in names]


def _rows_of(source: str | Path, place: Place, hub: HubSplits) -> Iterator[RawRow]:
    if isinstance(place, str):
        return _hub_rows(source, place, hub)
    if isinstance(place, Path) and place.is_file():
        return file_rows(place)
    return _renumbered(_files(place))


def _renumbered(files: list[Path]) -> Iterator[RawRow]:
    """Rows of several files, counted on from file to file."""
    index = 0
    for path in files:
        for row in file_rows(path):
            yield RawRow(row.record, row.where, index, row.fault)
            index += 1


def _hub_splits(source: str, hub: HubSplits) -> dict[str, Place | Unclear]:
    names = hub_names(source, hub.subset)
    asked = [name for name in (hub.train, hub.valid, hub.test) if name]
    whole = {name: m[1] for name in asked if (m := _SLICE.fullmatch(name)) and m[1] in names}
    found = _named(source, {name: name for name in (*names, *whole)}, hub)
    # nobody has named these as well, and some of their rows are another split's
    found = {s: at for s, at in found.items() if getattr(hub, s) or at not in whole.values()}
    if not found:
        raise FpoError(
            f"{source}: none of its splits ({', '.join(names)}) has a name that is known here. "
            "Name them with --train-split and --valid-split."
        )
    return found


@lru_cache
def hub_names(source: str, subset: str | None) -> tuple[str, ...]:
    """Its splits, asked for once by a process: every command looks them up several times."""
    from datasets import get_dataset_split_names

    try:
        return tuple(get_dataset_split_names(source, subset))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FpoError(_hub_trouble(source, error)) from error


def _hub_table(source: str | Path, name: str, hub: HubSplits) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(str(source), hub.subset, split=name)
    except Exception as error:  # see hub_names
        raise FpoError(_hub_trouble(str(source), error)) from error


def _hub_rows(source: str | Path, name: str, hub: HubSplits) -> Iterator[RawRow]:
    table = _hub_table(source, name, hub)
    try:
        for index, record in enumerate(table):
            yield RawRow(record, f"{source}[{name}]:{index + 1}", index)
    except Exception as error:  # see hub_names
        raise FpoError(_hub_trouble(str(source), error)) from error


def _hub_trouble(source: str, error: Exception) -> str:
    subsets = _subsets(source) if "config" in str(error).lower() else []
    if len(subsets) > 1:
        return (
            f"{source} has several configurations: {', '.join(subsets)}. Name one with "
            "--subset NAME."
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"{source}: no such file or folder here, and as a data set on the hub it cannot be read: "
        f"{lines[0][:300]}. Check the name and the network, log in with `hf auth login` if it is "
        "private, or pass a folder with train.jsonl."
    )


def _subsets(source: str) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return list(get_dataset_config_names(source))
    except Exception:  # what went wrong first is said
        return []
