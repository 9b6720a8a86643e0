"""Which files of a folder are one: a file, the parts of one, or what `datasets` saved."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from fpo_mlx.data.containers import stem
from fpo_mlx.records import PAIRS_FILE
from fpo_mlx.storage.files import listed

_HASH = r"(?:-[0-9a-f]{16})?"  # behind the numbers, as `datasets` wrote it in 2022
_OF = re.compile(rf"(\d+)-of-(\d+){_HASH}$")
_SHARD = re.compile(rf"(.+?)[-_.](?:part[-_]?)?\d+(?:-of-\d+{_HASH})?")
RECORD_MOST = 1 << 20  # bytes of what `pairs build` says of its rows


@dataclass(frozen=True)
class Unclear:
    """In the place of files that could be either; `why` is said where they are to be read."""

    why: str


def named_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder, by the name that they are parts of; of folders in it likewise."""
    groups: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for path in listed(place):
            if path.is_dir():
                inner = _saved_or_files(path)
                if inner:
                    groups.setdefault(path.name.lower(), inner)
            elif (name := stem(path)) is not None and not _is_record(path):
                shard = _SHARD.fullmatch(name)
                groups.setdefault((shard.group(1) if shard else name).lower(), []).append(path)
    return groups


def one_place(name: str, group: list[Path]) -> Path | tuple[Path, ...] | Unclear:
    """A file, or all parts of one."""
    plain = [path for path in group if path.name.lower() == f"{name}.jsonl"]
    if plain and len(group) > 1:
        return plain[0]
    stems = [stem(path) for path in group]
    if len(group) > 1 and (len(set(stems)) < len(stems) or name in (s.lower() for s in stems if s)):
        return Unclear(
            f"{group[0].parent}: {', '.join(path.name for path in group)} are all called "
            f"{name}. Keep one of them there, or name the file with --data."
        )
    return _lacking(group) or (group[0] if len(group) == 1 else tuple(group))


def _lacking(group: list[Path]) -> Unclear | None:
    """Where parts 1 to N of N are not all there once, as after half a download."""
    numbers = [match.groups() for path in group if (match := _OF.search(stem(path) or ""))]
    totals = {int(total) for _, total in numbers}
    if not totals:
        return None
    have = sorted(int(number) for number, _ in numbers)
    if len(totals) == 1 and len(have) == len(group) and have in (
        list(range(max(totals))), list(range(1, max(totals) + 1))
    ):  # fmt: skip
        return None
    return Unclear(
        f"{group[0].parent}: {', '.join(path.name for path in group)} are not all parts of one "
        f"file: {len(group)} of {' or '.join(map(str, sorted(totals)))}. Fetch what is missing, "
        "remove what is of another version, or name one file with --data."
    )


def _is_record(path: Path) -> bool:
    """Whether it is what `pairs build` says of the rows beside it, and no rows."""
    if path.name != PAIRS_FILE or path.stat().st_size > RECORD_MOST:
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and {"settings", "splits"} <= found.keys()


def _saved_or_files(folder: Path) -> list[Path]:
    if (folder / "state.json").is_file():
        return [folder]
    return [path for path in listed(folder) if path.is_file() and stem(path) is not None]
