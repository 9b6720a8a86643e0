"""The one rule for what a command writes: nothing that it did not make in the same run is lost.

A place is free when nothing is there, or an empty file or folder. Any other is refused with what is
there, unless its user said --overwrite. What a command reads is never what it writes, --overwrite
or not, under whatever spelling: links, hard links, letter case, a folder around it.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import TERMS

# what the system leaves beside any file, and nobody misses
SYSTEM = re.compile(r"\.DS_Store|\._.*|\.localized|Thumbs\.db")
# the same of a killed run of ours; counts only where nothing but what is written is lost
KILLED = re.compile(r"(store|train|writer)\.lock|\..*\.lock|" + files.WRITERS + ".*")
# of a training run's folder, what a later command reads; results may stand beside it
RUN_FILES = re.compile(
    r".*adapters\.safetensors|adapter_model\..*|adapter_config\.json|run\.json|metrics\.jsonl"
)
RUN_FOLDERS = ("checkpoint", "best")
HOW_BEGUN = ("resume", "overwrite")
SHOWN = 4

Place = str | Path | None


@dataclass(frozen=True)
class Made:
    """What a command makes of a folder.

    names: a pattern that all its entries match, folders with a slash; whole: the folder is replaced
    as one, so that entries of other names would be lost; mark: the file without which it is none;
    ways: what else there is to do about an older one; texts: of files with a common name, a pattern
    that the whole text of ours matches.
    """

    what: str  # "a training run"
    names: str
    whole: bool = False
    mark: str | None = None
    ways: str = ""
    texts: tuple[tuple[str, str], ...] = ()

    def named(self, name: str) -> bool:
        return re.fullmatch(self.names, name) is not None

    def marked(self, there: Sequence[str]) -> bool:
        return self.mark is None or self.mark in there

    def foreign(self, folder: Path, there: Sequence[str]) -> list[str]:
        """Those of the names in a folder that this command did not write."""
        if not self.marked(there):
            return list(there)
        other = [name for name, text in self.texts if not _is_text(folder / name, text)]
        return [name for name in there if name in other or not self.named(name)]


# of a base's folder: what belongs to the tokenizer and to the use of the model, not its weights
BESIDE = (
    *TERMS,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.jinja", "chat_template.json", "*.model", "*.tiktoken", "generation_config.json",
)  # fmt: skip
CODE = "*.py"  # and what code it brings
MODEL = Made(
    "a model folder",
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|"
    r"model\.safetensors\.index\.json|ggml-model-(f16|bf16|f32)\.gguf|README\.md|"
    r"tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)|"
    r"(LICENSE|NOTICE|USE_POLICY)[^/]*",
    whole=True,
    mark="config.json",
    texts=(("README.md", r"---\n((?!---).*\n)*library_name: mlx\n((?!---).*\n)*---\s*"),),
)


def model_made_from(base: Path | None, *more: str) -> Made:
    """A model folder with what is copied from its base, by the names that the base has, and `more`.

    Before the base is known, with any that one could have: the claim is made again with it.
    """
    wanted = (*BESIDE, CODE)
    if base is None:
        copied = [re.escape(each).replace(r"\*", "[^/]*") for each in wanted]
    else:
        found = [path for each in wanted for path in files.listed(base, each)]
        copied = [re.escape(path.name) for path in found if path.is_file()]
    return replace(MODEL, names="|".join((MODEL.names, *copied, *map(re.escape, more))))


def claim_file(
    place: str | Path, flag: str, *, inputs: Iterable[Place] = (), overwrite: bool = False
) -> Path:
    """The place, ~ spelled out. Touches nothing.

    A pipe or a device is always free. flag: the option that named it, for the message.
    Raises: ConfigError where writing this file would lose something.
    """
    place = Path(place).expanduser()
    refuse_inputs(place, flag, inputs)
    if place.is_dir():
        raise ConfigError(f"{flag} {place}: this is a folder. Wanted the name of a file.")
    if not place.is_file() or not place.stat().st_size:
        return place
    if not overwrite:
        raise ConfigError(
            f"{flag} {place}: a file of {place.stat().st_size} bytes is there already. "
            "--overwrite replaces it; or name another place."
        )
    _refuse_parts(place, flag, inputs)
    return place


def claim_files(
    places: dict[str, Path | None], *, inputs: Iterable[Place] = (), overwrite: bool = False
) -> None:
    """The same for several files of one command, which may not be one and the same."""
    inputs, given = list(inputs), [(f, Path(p)) for f, p in places.items() if p is not None]
    for i, (flag, place) in enumerate(given):
        claim_file(place, flag, inputs=inputs, overwrite=overwrite)
        for other_flag, other in given[:i]:
            if _plain(place) and same_place(place, other):
                raise ConfigError(
                    f"{other_flag} and {flag} both name {place}. Give each a place of its own."
                )


def claim_folder(
    place: str | Path,
    flag: str,
    made: Made,
    *,
    inputs: Iterable[Place] = (),
    overwrite: bool = False,
) -> Path:
    """The place, ~ spelled out. Touches nothing.

    Where long work lies between this and the writing, it is asked again just before that.
    Raises: ConfigError where writing this folder would lose something.
    """
    place, inputs = Path(place).expanduser(), list(inputs)
    refuse_inputs(place, flag, inputs, made)
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{flag} {place}: this is a file. Wanted the name of a folder.")
    if made.whole and os.path.ismount(os.path.realpath(place)):
        raise ConfigError(
            f"{flag} {place}: a disk is mounted here, and {made.what} is put in its place whole. "
            "Name a folder in it."
        )
    there = contents(place, made.whole)
    if not there:
        return place
    foreign = made.foreign(place, there)
    if foreign and made.whole:
        raise ConfigError(
            f"{flag} {place}: holds {_list(foreign)}, which {made.what} does not have, and the "
            "folder would be replaced as a whole. Name a new folder."
        )
    if not overwrite:
        old = f"{made.what} ({_list(there)})" if not foreign else _list(there)
        raise ConfigError(
            f"{flag} {place}: holds {old}. {made.ways if not foreign else ''}--overwrite replaces "
            f"{made.what} there; or name a new folder."
        )
    if not made.marked(there) and (taken := [name for name in there if made.named(name)]):
        raise ConfigError(
            f"{flag} {place}: holds {_list(taken)}, which would be replaced, and no {made.mark}: "
            f"it is not of {made.what}. Name a new folder."
        )
    if foreign:
        _refuse_parts(place, flag, inputs)
    refuse_links(place, flag, made)
    return place


def refuse_links(place: Path, flag: str, made: Made) -> None:
    """Raises: ConfigError for links in a folder that would be written through, or emptied."""
    for path in () if made.whole or not place.is_dir() else sorted(place.iterdir()):
        if not (made.named(path.name) or made.named(path.name + "/")):
            continue
        inner = sorted(path.rglob("*")) if _is_folder(path) else ()
        if links := [p for p in (path, *inner) if p.is_symlink()]:
            raise ConfigError(
                f"{flag} {place}: {links[0].relative_to(place)} in it is a link to "
                f"{os.readlink(links[0])}, which would be written to. Name a new folder, or put a "
                "copy in the link's place."
            )


def of_the_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that say how a command was begun: alike runs have alike records.

    Infinity, which JSON does not have, is the text "inf", as settings may be written.
    """
    return {
        name: str(value) if isinstance(value, float) and math.isinf(value) else value
        for name, value in settings.items()
        if name not in HOW_BEGUN
    }


def contents(folder: Path, whole: bool = False) -> list[str]:
    """The names in a folder, without what the system or a killed run left; [] where there is none.

    A folder's name ends with a slash. whole: the folder is replaced as one.
    """

    def counts(path: Path) -> bool:
        if SYSTEM.fullmatch(path.name):
            return path.is_dir()
        return whole or not KILLED.fullmatch(path.name)

    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p.name + "/" * _is_folder(p) for p in there if counts(p)]


def _is_text(path: Path, pattern: str) -> bool:
    """Whether the whole text of a file matches."""
    try:
        return re.fullmatch(pattern, path.read_text(encoding="utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def refuse_inputs(
    place: Path, flag: str, inputs: Iterable[Place], made: Made | None = None
) -> None:
    """Raises: ConfigError where the place is what is read, or a folder around it.

    made: in a folder that is not replaced as one, what bears none of its names may be read.
    """
    for source in existing(inputs):
        if not _plain(source):
            continue
        if same_place(place, source):
            raise ConfigError(
                f"{flag} {place}: this is {source}, which the command reads. Name another place."
            )
        way = _way_into(place, source) if place.is_dir() else None
        if way and (made is None or made.whole or made.named(way[0]) or made.named(way[0] + "/")):
            raise ConfigError(
                f"{flag} {place}: {source}, which the command reads, lies in it. "
                "Name another place."
            )


def _refuse_parts(place: Path, flag: str, inputs: Iterable[Place]) -> None:
    """The place is there and belongs to a folder that is read."""
    for source in existing(inputs):
        if source.is_dir() and (way := _way_into(source, place)) is not None:
            first = way[0]
            if (source / "adapter_config.json").is_file() and not (
                first in RUN_FOLDERS or (len(way) == 1 and RUN_FILES.fullmatch(first))
            ):
                continue
            raise ConfigError(
                f"{flag} {place}: this is a part of {source}, which the command reads. "
                "Name another place."
            )


def _way_into(folder: Path, place: Path) -> tuple[str, ...] | None:
    """The names that lead from a folder to a place within; None where it lies elsewhere."""
    real = place.resolve()
    for up in _parents(real):
        if same_place(up, folder):
            return real.parts[len(up.parts) :]
    return None


def existing(inputs: Iterable[Place]) -> list[Path]:
    """Those of the names that are places on this disk; a hub id is none."""
    found = []
    for name in inputs:
        try:
            path = Path(name).expanduser() if name else None
            if path is not None and path.exists():
                found.append(path)
        except (OSError, ValueError, RuntimeError):  # no name that a disk could have
            continue
    return found


def _parents(path: Path) -> tuple[Path, ...]:
    return tuple(path.resolve().parents)


def same_place(a: Path, b: Path) -> bool:
    """One thing on disk under two names: links, hard links, letter case, Unicode's forms."""
    if a.resolve() == b.resolve():
        return True  # neither has to be there
    try:
        return a.samefile(b)
    except OSError:
        return False


def _plain(path: Path) -> bool:
    """A file or folder, or nothing yet; no pipe and no device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
