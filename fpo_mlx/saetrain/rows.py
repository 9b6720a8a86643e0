"""Activations in shuffled batches under a memory bound, repeatable from a few numbers.

Documents are cut into chunks whose activations fit the bound. A chunk is computed, its rows are
shuffled, and all of them are used before the next one. Where everything fits there is one chunk:
it is computed once and shuffled anew for every pass. A batch is a function of (seed, chunk, row),
so a resumed run needs no stored buffer: it computes its chunk again. A chunk that is smaller than
a batch (the last of a pass can be) is left out; other passes have its rows in other chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fpo_mlx.errors import FpoError
from fpo_mlx.saetrain.texts import Document
from fpo_mlx.storage import files, locks


@dataclass(frozen=True)
class Position:
    """What has been used: rows of chunk `chunk`, counted over all passes."""

    chunk: int = 0
    row: int = 0


def plan_chunks(counts: Sequence[int], rows: int, order: Sequence[int]) -> list[list[int]]:
    """Documents of each chunk, in the given order; a chunk has at most `rows` positions.

    counts: positions of each document. A document that alone has more is a chunk of its own.
    """
    chunks: list[list[int]] = []
    filled = 0
    for i in order:
        if not chunks or filled + counts[i] > rows:
            chunks.append([])
            filled = 0
        chunks[-1].append(int(i))
        filled += counts[i]
    return chunks


@dataclass(frozen=True)
class Source:
    """Chunk number, counted over all passes -> rows [R, D]. `chunks` make the first pass.

    The caller lets go of a chunk before it asks for the next: memory is meant for one.
    """

    chunk: Callable[[int], np.ndarray]
    chunks: int


def from_documents(
    documents: Sequence[Document],
    rows_of: Callable[[Sequence[Document]], np.ndarray],
    *,
    rows: int,
    seed: int,
    least: int = 1,
) -> Source:
    """Activations computed as they are needed, at most `rows` of them in memory.

    least: rows of a batch; a chunk with fewer positions is left out of its pass. Raises FpoError
    when a pass has several chunks and none with so many.
    """
    counts = [int(document.keep.sum()) for document in documents]
    single = sum(counts) <= rows

    def order(turn: int) -> list[int]:
        return np.random.default_rng([seed, 2, turn]).permutation(len(documents)).tolist()

    if single:
        whole = _with_the_last_kept(lambda _: rows_of(documents))
        return Source(lambda number: whole(0), 1)

    def plan(turn: int) -> list[list[int]]:
        chunks = plan_chunks(counts, rows, order(turn))
        return [part for part in chunks if sum(counts[i] for i in part) >= least]

    if not plan(0):
        raise FpoError(
            f"--memory-gb has room for {rows} activations at once, and no whole documents within "
            f"it make one batch of {least}. Give more --memory-gb, or a smaller --batch-size."
        )

    def chunk(number: int) -> np.ndarray:
        turn = 0
        while number >= len(plan(turn)):  # passes differ in order, and so in chunks
            number, turn = number - len(plan(turn)), turn + 1
        return rows_of([documents[i] for i in plan(turn)[number]])

    return Source(_with_the_last_kept(chunk), len(plan(0)))


def _with_the_last_kept(make: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """The same chunks; the one that was asked for last is not made again."""
    kept: dict[int, np.ndarray] = {}

    def chunk(number: int) -> np.ndarray:
        if number not in kept:
            kept.clear()  # before the next one is made: two would be twice the bound
            kept[number] = make(number)
        return kept[number]

    return chunk


def from_array(array: np.ndarray) -> Source:
    """Rows that are there already, in memory or mapped from a file."""
    return Source(lambda number: array, 1)


def batches(
    source: Source, batch: int, seed: int, start: Position
) -> Iterator[tuple[np.ndarray, Position]]:
    """(rows [batch, D] float32, the position behind them), endless. The rest of a chunk is left.

    So is a chunk smaller than a batch. Raises FpoError when three passes have no other.
    """
    number, row, short = start.chunk, start.row, 0
    while True:
        rows = source.chunk(number)
        short = short + 1 if len(rows) < batch else 0
        if short >= 3 * source.chunks:  # good ones can be nearly two passes apart
            raise FpoError(
                f"{len(rows)} activations are fewer than one batch of {batch}. Give more text, "
                "more --memory-gb, or a smaller --batch-size."
            )
        order = np.random.default_rng([seed, 3, number]).permutation(len(rows))
        while row + batch <= len(rows):
            picked = rows[np.sort(order[row : row + batch])]
            row += batch
            yield np.ascontiguousarray(picked, dtype=np.float32), Position(number, row)
        del rows  # before the next chunk is made: two would be twice the bound
        number, row = number + 1, 0


STORE_ROWS, STORE_ABOUT = "rows.npy", "store.json"
STORE_LOCK = "store.lock"  # held while a store is written


def write_store(folder: Path, parts: Iterator[np.ndarray], about: dict) -> int:
    """Append parts [r, D] to folder/rows.npy, float32; whole or not at all. Returns the rows.

    about: what the activations are of; `read_store` gives it back. What a killed writer left is
    cleared. Raises FpoError when another process writes this store, or there is nothing to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder / STORE_LOCK, folder):
        for name in (STORE_ROWS, STORE_ABOUT):
            files.sweep(folder, name)
        total, width = _write_rows(folder, parts)
        files.write_json(folder / STORE_ABOUT, about | {"rows": total, "width": width})
    return total


def _write_rows(folder: Path, parts: Iterator[np.ndarray]) -> tuple[int, int]:
    """(rows, width) of the file that was written."""
    total, width = 0, None
    with files.atomic_path(folder / STORE_ROWS) as temporary, open(temporary, "wb") as stream:
        for part in parts:
            if width is None:
                width = part.shape[1]
                stream.write(_header(0, width))
            part.astype("<f4", copy=False).tofile(stream)
            total += len(part)
        if width is None:
            raise FpoError(f"{folder}: no activations to store.")
        stream.seek(0)
        stream.write(_header(total, width))
    return total, width


def _header(rows: int, width: int) -> bytes:
    """An .npy header of 128 bytes whatever the number of rows."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def read_store(folder: Path) -> tuple[np.ndarray, dict]:
    """(rows mapped from the file, what they are of). Raises FpoError if it is not a store."""
    try:
        about = json.loads((folder / STORE_ABOUT).read_text(encoding="utf-8"))
        return np.load(folder / STORE_ROWS, mmap_mode="r"), about
    except (OSError, ValueError) as error:
        raise FpoError(
            f"{folder} holds no stored activations that can be read: {error}."
        ) from error
