"""A reference cache on disk: look rows up, append rows, one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from fpo_mlx.cache.identity import (
    FORMAT,
    VERSION,
    CacheIdentity,
    Provenance,
    check_same,
    differences,
    from_manifest,
    to_manifest,
)
from fpo_mlx.cache.shards import (
    Row,
    Shard,
    check_content,
    content,
    encode_shard,
    open_shard,
    read_features,
)
from fpo_mlx.errors import CacheMismatch, FpoError
from fpo_mlx.records import ResponseScore
from fpo_mlx.storage import files, locks
from fpo_mlx.storage.tensors import OpenFiles

MANIFEST = "manifest.json"
LOCK = "writer.lock"
PARTS = "parts"  # of several processes, while they fill the cache
SHARD_NAME = re.compile(r"rows-(\d{5,})\.safetensors")


def read_identity(folder: str | Path) -> CacheIdentity:
    """What the cache in this folder was made of. Raises CacheMismatch when there is none."""
    return read_manifest(folder)[0]


def read_manifest(folder: str | Path) -> tuple[CacheIdentity, Provenance]:
    """What the cache was made of, and by what first. Raises CacheMismatch when there is none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = files.parse_json(path.read_text(encoding="utf-8"))
        kind = (manifest["format"], manifest["version"])
        if kind == (FORMAT, VERSION):
            return from_manifest(manifest["identity"])
    except FileNotFoundError:
        raise CacheMismatch(
            f"{folder} is no reference cache: it has no {MANIFEST}. "
            "Make one with `fpo-mlx precompute`, or name the folder that it wrote."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheMismatch(
            f"{path} cannot be read as the manifest of a reference cache ({error}). "
            "Copy the cache again, or run `fpo-mlx precompute` into a new folder."
        ) from error
    raise CacheMismatch(
        f"{path} is {kind[0]} version {kind[1]}; this program reads {FORMAT} version {VERSION}. "
        "Run `fpo-mlx precompute` into a new folder."
    )


def open_cache(
    folder: str | Path,
    identity: CacheIdentity,
    *,
    create: bool = False,
    allow: Collection[str] = (),
    made: Provenance | None = None,
) -> ReferenceCache:
    """Open the cache for a run of this identity; nothing is written before the first append.

    identity.saes may be fewer than the cache's: `get` then returns the features of those, in their
    order. allow: names of identity fields that may differ ("model"); such a cache is read-only.
    made: by what the rows that are appended were made.
    Raises CacheMismatch when it was made for something else, FpoError when a shard is damaged.
    """
    folder = Path(folder)
    # listed once: another process may write the manifest at any moment
    names = [path.name for path in folder.iterdir()] if create and folder.exists() else []
    if MANIFEST in names or not create:
        found, first = read_manifest(folder)
        check_same(folder, found, identity, allow)
        return ReferenceCache(folder, found, identity, made or first)
    if others := list(filter(_foreign, names)):
        raise CacheMismatch(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}) and no {MANIFEST}. "
            "Name an empty or a new folder for the reference cache."
        )
    return ReferenceCache(folder, identity, identity, made or Provenance())


def _foreign(name: str) -> bool:
    ours = name in (LOCK, PARTS) or SHARD_NAME.fullmatch(name)
    return not ours and not name.startswith(".")


class ReferenceCache:
    """Rows by key. Made by `open_cache`; format in the package's docstring.

    identity: what is on disk. wanted: what the run asked for (a subset of its SAEs). made: by what
    its rows are made, if it appends any.
    """

    def __init__(
        self, folder: Path, identity: CacheIdentity, wanted: CacheIdentity, made: Provenance
    ) -> None:
        self.folder, self.identity, self.wanted, self.made = folder, identity, wanted, made
        self.differences = differences(identity, wanted)
        self.shards: list[Shard] = []
        self._rows: dict[bytes, tuple[Shard, int]] = {}
        self._checked: set[Path] = set()
        self._files = OpenFiles()
        self._depth, self._lock = 0, -1
        self._selected = [identity.saes.index(sae) for sae in wanted.saes if sae in identity.saes]
        self._discover()

    @property
    def half(self) -> bool:
        """Whether a row was made by a model in half precision."""
        return any(shard.dtype != "float32" for shard in self.shards)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def keys(self) -> list[bytes]:
        """All keys in the order of the files."""
        return list(self._rows)

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The keys without a row, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def kind_of(self, key: bytes) -> tuple[str, str]:
        """Backend and data type that made the row of this key."""
        shard, _ = self._rows[key]
        return shard.backend, shard.dtype

    def get(self, key: bytes) -> ResponseScore:
        """The row of this key, its features in the order of `wanted.saes`.

        Raises CacheMismatch when there is no such row, FpoError when its shard is damaged.
        """
        if key not in self._rows:
            raise CacheMismatch(
                f"{self.folder} has no row for {key.hex()} among its {len(self)}. "
                "Run `fpo-mlx precompute` on this data: it computes only what is missing."
            )
        shard, row = self._rows[key]
        if shard.path not in self._checked:
            check_content(shard)
            self._checked.add(shard.path)
        features = read_features(shard, row, self._selected, self._files)
        return ResponseScore(float(shard.logps[row]), int(shard.tokens[row]), features)

    def append(self, rows: Sequence[Row]) -> int:
        """Write the rows that are not yet there as one shard; the number of rows written.

        Raises FpoError on values that are not finite, CacheMismatch when this run may not write
        here (another identity), FpoError when another process writes.
        """
        self.check_extendable()
        with self.writing():
            new = {key: score for key, score in rows if key not in self._rows}
            return self.append_whole(list(new.items()))

    def append_whole(self, rows: Sequence[Row]) -> int:
        """`append` without a look at what is there already, which stays what is read."""
        self.check_extendable()
        with self.writing():
            if rows:
                self._write(encode_shard(rows, self.wanted, self.made))
        return len(rows)

    def adopt(self, shard: Shard, identity: CacheIdentity) -> int:
        """Take a whole shard of another cache as it is; the number of rows that were new.

        A row that was there stays the one that is read. A shard with nothing new is not taken.
        Raises CacheMismatch when the other cache's identity is not this one's, FpoError when the
        shard is damaged or gone.
        """
        self._refuse_unless_same(identity)
        with self.writing():
            new = self.missing(shard.keys)
            if new:
                self._write(content(shard))
        return len(new)

    def check_extendable(self) -> None:
        """Raises CacheMismatch when this run's rows would not fit to those that are there.

        Such a cache can be read all the same: a run without SAEs reads one that has some.
        """
        self._refuse_unless_same(self.wanted)

    def _refuse_unless_same(self, identity: CacheIdentity) -> None:
        if self.identity != identity:
            raise CacheMismatch(
                f"{self.folder} holds rows of another model, adapter, tokenizer, feature limit or "
                "list of SAEs than these, so it can be read here and not extended. Run `fpo-mlx "
                "precompute` with the cache's own settings, or into another folder."
            )

    def _write(self, data: bytes) -> None:
        number = 1 + max((_number(shard.path) for shard in self.shards), default=-1)
        path = self.folder / f"rows-{number:05d}.safetensors"
        files.write_bytes(path, data)
        self._add(open_shard(path, self.identity))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing (re-entrant). Raises FpoError when another process does."""
        if self._depth == 0:
            self._lock = _acquire(self.folder)
        self._depth += 1
        try:
            if self._depth == 1:
                self._prepare()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                locks.release(self.folder / LOCK, self._lock)

    def mark_used(self) -> None:
        """Say to `cache prune` that this cache is in use, where it may be written."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / MANIFEST)

    def tidy(self) -> None:
        """Remove a killed writer's lock and half files; a living writer's stay."""
        if (self.folder / LOCK).exists():
            with (
                contextlib.suppress(OSError, FpoError),
                locks.held(self.folder / LOCK, self.folder),
            ):
                files.sweep(self.folder)

    def _prepare(self) -> None:
        """With the lock held, delete stale temporary files and pick up new shards."""
        files.sweep(self.folder)
        path = self.folder / MANIFEST
        if path.exists():
            check_same(self.folder, read_identity(self.folder), self.identity)
        else:
            about = to_manifest(self.identity, self.made)
            text = json.dumps(about, indent=2, sort_keys=True) + "\n"
            files.write_bytes(path, text.encode())
        self._discover()

    def _discover(self) -> None:
        known = {shard.path for shard in self.shards}
        for path in shard_paths(self.folder):
            if path not in known:
                self._add(open_shard(path, self.identity))

    def _add(self, shard: Shard) -> None:
        self.shards.append(shard)
        for row, key in enumerate(shard.keys):
            self._rows.setdefault(key, (shard, row))


def shard_paths(folder: Path) -> list[Path]:
    """The shard files in the order of their numbers."""
    if not folder.exists():
        return []
    return sorted((p for p in folder.iterdir() if SHARD_NAME.fullmatch(p.name)), key=_number)


def _number(path: Path) -> int:
    match = SHARD_NAME.fullmatch(path.name)
    assert match is not None  # shard_paths lets no other name through
    return int(match[1])


def _acquire(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return locks.acquire(folder / LOCK, folder)
    except OSError as error:
        raise files.unwritable(folder, error) or error from error
