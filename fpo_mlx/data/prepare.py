"""One split as token pairs of full length, with what is to be said of it; kept by content.

Tokenizing takes minutes for a large set and gives the same result every time. So the result is
kept in a folder named by all that decides it, and read from there. It can be made again at any
time: whoever needs the room may delete it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Protocol

import numpy as np

from fpo_mlx import __version__
from fpo_mlx.data import token_store
from fpo_mlx.data.findings import Finding, Kind, Seen, by_kind, length_bias, repeats, seen
from fpo_mlx.data.holdout import content_key, iterate_raw
from fpo_mlx.data.inspect import Inspected, inspect
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.read import AUTO_SPLITS, HubSplits
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns
from fpo_mlx.data.token_store import Stored
from fpo_mlx.data.tokenize import Tokenizer, refusal
from fpo_mlx.data.variables import Asked
from fpo_mlx.errors import FpoError
from fpo_mlx.records import TokenPair
from fpo_mlx.storage import files

Progress = Callable[[int], None]
KEPT_FROM = 500  # rows: fewer are tokenized in a moment
IN_MEMORY = 16_000_000  # bytes of tokens, before they go to a temporary file


class KeyedTokenizer(Tokenizer, Protocol):
    """A tokenizer that can say what its tokens depend on."""

    def encoding_key(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """A split whose rows can all be used."""

    split: str
    pairs: list[TokenPair]  # of full length, in the order of the rows
    topics: list[bytes]  # of each prompt; equal in two splits: leakage
    kinds: tuple[Kind, ...]  # what `check` finds in this split, but for what --max-seq-length costs


@dataclass(frozen=True)
class _Made:
    """What `Prepared` holds, while the tokens are still in a file of their own."""

    places: list[token_store.Place]
    topics: list[bytes]
    kinds: tuple[Kind, ...]


def prepare(
    source: str | Path,
    split: str,
    tokenizer: KeyedTokenizer,
    columns: Columns = DEFAULT_COLUMNS,
    hub: HubSplits = AUTO_SPLITS,
    *,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read and tokenize a split, or take what a run before this one kept in the folder `store`.

    progress: called with the rows done so far, where they have to be tokenized.

    Raises DataError (no rows, or rows that cannot be used: all of them are named) and FpoError
    (no such source or split).
    """
    folder = None if store is None else _place(source, split, tokenizer, columns, hub, store)
    if folder is not None:
        kept = token_store.load(folder)
        if kept is not None:
            return _prepared(split, kept)
    with SpooledTemporaryFile(max_size=IN_MEMORY) as sink:
        made = _made(source, split, tokenizer, columns, hub, sink, progress)
        if folder is not None and len(made.places) >= KEPT_FROM:
            kept = _kept(folder, sink, made)
            if kept is not None:
                return _prepared(split, kept)
        sink.seek(0)
        tokens = np.frombuffer(sink.read(), dtype="<i4")
    return Prepared(split, token_store.pairs_of(tokens, made.places), made.topics, made.kinds)


@contextmanager
def keeping(
    source: str | Path,
    split: str,
    tokenizer: KeyedTokenizer,
    columns: Columns = DEFAULT_COLUMNS,
    hub: HubSplits = AUTO_SPLITS,
    *,
    store: Path,
) -> Iterator[Callable[[Inspected], None]]:
    """Takes the rows that another reads of a split, and keeps them in `store` as `prepare` would.

    Nothing is kept of a split with rows that cannot be used, or that was read in part.
    """
    folder = _place(source, split, tokenizer, columns, hub, store)
    with SpooledTemporaryFile(max_size=IN_MEMORY) as sink:
        rows = _Gathered(split, sink)
        yield rows.take
        if not rows.faults and len(rows.places) >= KEPT_FROM and not folder.exists():
            _kept(folder, sink, rows.made())


def _place(
    source: str | Path,
    split: str,
    tokenizer: KeyedTokenizer,
    columns: Columns,
    hub: HubSplits,
    store: Path,
) -> Path:
    """The folder of a split's tokens, named by all that decides them."""
    parts = [token_store.FORMAT, __version__, content_key(source, split, hub), split]
    parts += [tokenizer.encoding_key(), vars(columns)]
    return store / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _kept(folder: Path, sink: IO[bytes], made: _Made) -> Stored | None:
    """What was made, read back from `folder`; None where it cannot be kept there."""
    try:
        with files.atomic_folder(folder) as work:
            sink.seek(0)
            with (work / token_store.TOKENS).open("wb") as out:
                shutil.copyfileobj(sink, out, 1 << 22)
            token_store.describe(work, made.places, made.topics, made.kinds)
        token_store.prune(folder.parent, keep=folder)
    except (FpoError, OSError):  # no room, no rights, another process at it: go on without
        return None
    return token_store.load(folder)


def _prepared(split: str, kept: Stored) -> Prepared:
    kinds = tuple(
        Kind(Finding(kind, split, where, what), count) for kind, where, what, count in kept.kinds
    )
    return Prepared(split, kept.pairs, kept.topics, kinds)


def _made(
    source: str | Path,
    split: str,
    tokenizer: Tokenizer,
    columns: Columns,
    hub: HubSplits,
    sink: IO[bytes],
    progress: Progress | None,
) -> _Made:
    """From the rows."""
    found = _Gathered(split, sink)
    for item in inspect(iterate_raw(source, split, hub, columns), split, tokenizer, columns):
        found.take(item)
        if progress is not None:
            progress(found.done)
    if found.faults:
        raise refusal(f"{source} ({split})", found.faults, found.done, found.asked)
    return found.made()


class _Gathered:
    """Row by row. The tokens go to `sink`, so that the pairs need not hold them twice."""

    def __init__(self, split: str, sink: IO[bytes]) -> None:
        self.done = self._at = 0
        self.places: list[token_store.Place] = []
        self.faults: list[tuple[str, RowFault]] = []
        self.asked = Asked()
        self._split, self._sink = split, sink
        self._known: list[Seen] = []
        self._findings: list[Finding] = []

    def take(self, item: Inspected) -> None:
        self.done += 1
        if item.row is None or item.pair is None:
            if item.fault is not None:
                self.faults.append((item.raw.where, item.fault))
            return
        self.asked.take(item.row.variables)
        if self.faults:
            return  # only what else is wrong is wanted now
        self._findings += item.findings
        self._known.append(seen(item.row, item.pair))
        parts = (item.pair.prompt, item.pair.chosen, item.pair.rejected)
        for part in parts:
            self._sink.write(part.astype("<i4").tobytes())
        sizes = len(parts[0]), len(parts[1]), len(parts[2])
        self.places.append((self._at, *sizes, item.raw.where, item.pair.facts))
        self._at += sum(sizes)

    def made(self) -> _Made:
        """All of the split, with what only the whole shows."""
        findings = [*self._findings, *repeats(self._split, self._known)]
        findings += length_bias(self._split, [row.lengths for row in self._known])
        return _Made(self.places, [row.topic for row in self._known], tuple(by_kind(findings)))
