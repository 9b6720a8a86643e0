"""Which reference caches lie in a folder, how large and how old they are; removing some."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fpo_mlx.cache.store import LOCK, MANIFEST, PARTS, read_identity, shard_paths
from fpo_mlx.errors import FpoError
from fpo_mlx.storage import files, locks

DAY = 86400.0


@dataclass(frozen=True)
class Entry:
    """A reference cache on disk."""

    folder: Path
    bytes: int  # of shards and manifest
    shards: int
    days: float  # since it was last written or read for a run
    model: str  # fingerprint
    saes: int
    writer: str | None  # who is writing it


def list_caches(root: Path) -> list[Entry]:
    """The caches directly below a folder, the oldest first. What is no cache is passed over."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_symlink() or not (folder / MANIFEST).is_file():
            continue
        try:
            found.append(entry_of(folder))
        except (FpoError, FileNotFoundError):  # another manifest; removed while we look
            continue
    return sorted(found, key=lambda entry: -entry.days)


def entry_of(folder: Path) -> Entry:
    """Raises: FpoError when the folder is no reference cache."""
    identity = read_identity(folder)
    stats = [path.stat() for path in (*shard_paths(folder), folder / MANIFEST)]
    return Entry(
        folder=folder,
        bytes=sum(stat.st_size for stat in stats),
        shards=len(stats) - 1,
        days=max(0.0, time.time() - max(stat.st_mtime for stat in stats)) / DAY,
        model=identity.model,
        saes=len(identity.saes),
        writer=locks.owner(folder / LOCK) or _writer_of_parts(folder),
    )


def select(
    entries: Iterable[Entry],
    *,
    older_than: float | None = None,
    larger_than: float | None = None,
    model: str | None = None,
) -> list[Entry]:
    """Those that meet every condition that is given. older_than: days; larger_than: megabytes;
    model: the beginning of its fingerprint. A cache that is being written is never among them."""
    return [
        entry
        for entry in entries
        if entry.writer is None
        and (older_than is None or entry.days >= older_than)
        and (larger_than is None or entry.bytes >= larger_than * 1e6)
        and (model is None or entry.model.startswith(model))
    ]


def remove(folder: Path) -> int:
    """Delete a cache; the bytes that were freed. Other files in its folder stay.

    Killed half-way, it leaves a smaller cache that is whole. Raises: FpoError when the folder is
    no cache, or somebody writes it.
    """
    freed = entry_of(folder).bytes
    try:
        with locks.held(folder / LOCK, folder):
            if writer := _writer_of_parts(folder):
                raise FpoError(f"{folder / PARTS} is being written by {writer}. Wait for its end.")
            for shard in reversed(shard_paths(folder)):
                shard.unlink()
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            files.sweep(folder)
            (folder / MANIFEST).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise files.unwritable(folder, error) or error from error
    return freed


def _writer_of_parts(folder: Path) -> str | None:
    parts = (folder / PARTS).glob("*")
    return next((owner for part in parts if (owner := locks.owner(part / LOCK))), None)
