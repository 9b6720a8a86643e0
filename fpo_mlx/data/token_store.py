"""Tokenized pairs on disk, one folder for a split: a cache, which may be deleted at any time.

tokens.i32   the tokens of all pairs, prompt, chosen and rejected after one another, little endian
rows.npz     sizes int32 [N, 3]; topics uint8 [N, 16]; facts float64 [N, 3];
             where, the names of the rows, by zero bytes
about.json   format, pairs, CRC-32 of tokens.i32, findings as [kind, where, what, count]
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from fpo_mlx.data.findings import LEVELS, Kind
from fpo_mlx.records import PairFacts, TokenPair
from fpo_mlx.storage import files

FORMAT = 3  # also raised where a rule changes of which rows are taken, and as what
TOKENS, ROWS, ABOUT = "tokens.i32", "rows.npz", "about.json"
MOST_BYTES = 4_000_000_000  # of all folders together; the longest unused go first

# first token, sizes of the three parts, name of the row, what the row says of its pair
Place = tuple[int, int, int, int, str, PairFacts]


@dataclass(frozen=True)
class Stored:
    pairs: list[TokenPair]
    topics: list[bytes]
    kinds: tuple[tuple[str, str, str, int], ...]


def load(folder: Path) -> Stored | None:
    """What is in a folder; None where it is not there, not whole, or of another format."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            return None
        tokens = mapped(folder / TOKENS)
        if zlib.crc32(tokens) != about["crc"]:  # type: ignore[arg-type]
            return None
        with (folder / ROWS).open("rb") as file, np.load(file, allow_pickle=False) as rows:
            sizes, topics = rows["sizes"], rows["topics"]
            facts = [PairFacts(*row) for row in rows["facts"].tolist()]
            names = rows["where"].tobytes().decode("utf-8", "surrogateescape").split("\0")
        if not len(sizes) == len(topics) == len(names) == len(facts) == about["pairs"]:
            return None
        kinds = tuple((str(k), str(w), str(t), int(n)) for k, w, t, n in about["kinds"])
        if sizes.sum() != len(tokens) or not {kind for kind, *_ in kinds} <= set(LEVELS):
            return None
        with suppress(OSError):
            os.utime(folder)  # used now: the last to be pruned
        ends = np.cumsum(sizes.sum(axis=1))
        starts = (ends - sizes.sum(axis=1)).tolist()
        places = zip(starts, *sizes.T.tolist(), names, facts, strict=True)
        return Stored(pairs_of(tokens, places), [bytes(one) for one in topics], kinds)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def describe(
    folder: Path, places: Sequence[Place], topics: Sequence[bytes], kinds: Iterable[Kind]
) -> None:
    """Write all but the tokens, which lie there already."""
    sizes = [place[1:4] for place in places]
    where = "\0".join(place[4] for place in places).encode("utf-8", "surrogateescape")
    np.savez(
        folder / ROWS,
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 3),
        facts=np.array([astuple(place[5]) for place in places], dtype=np.float64).reshape(-1, 3),
        topics=np.frombuffer(b"".join(topics), dtype=np.uint8).reshape(-1, 16),
        where=np.frombuffer(where, dtype=np.uint8),
    )
    about = {
        "format": FORMAT,
        "pairs": len(places),
        "crc": zlib.crc32(mapped(folder / TOKENS)),  # type: ignore[arg-type]
        "kinds": [[k.first.kind, k.first.where, k.first.what, k.count] for k in kinds],
    }
    files.write_json(folder / ABOUT, about)


def mapped(path: Path) -> np.ndarray:
    """Tokens in a file, int32 [all], read when they are looked at."""
    if not path.stat().st_size:
        return np.zeros(0, dtype="<i4")
    return np.asarray(np.memmap(path, dtype="<i4", mode="r"))


def pairs_of(tokens: np.ndarray, places: Iterable[Place]) -> list[TokenPair]:
    """Pairs as views of their tokens; no token is copied."""
    pairs = []
    for index, (at, prompt, chosen, rejected, where, facts) in enumerate(places):
        a, b = at + prompt, at + prompt + chosen
        parts = tokens[at:a], tokens[a:b], tokens[b : b + rejected]
        pairs.append(TokenPair(*parts, index=index, where=where, facts=facts))
    return pairs


def prune(store: Path, keep: Path, most: int = MOST_BYTES) -> None:
    """Remove the folders that were not used for longest until the rest is small enough.

    What killed runs left half-written goes in any case.
    """
    files.sweep_killed(store)
    folders = [path for path in store.iterdir() if (path / ABOUT).is_file()]
    folders.sort(key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(f.stat().st_size for f in path.iterdir()) for path in folders}
    total = sum(sizes.values())
    for path in folders:
        if total <= most:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]
