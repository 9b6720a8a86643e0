"""What an SAE is trained on: rows of text, chats or preference pairs, as token sequences.

Numpy only. A sequence carries a mask of the positions whose activations count. The first position
never does: a transformer parks attention there, with a norm tens of times the usual (attention
sinks, Xiao et al. 2023, arXiv 2309.17453; massive activations, Sun et al. 2024, 2402.17762).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx import data
from fpo_mlx.data import documents
from fpo_mlx.data.answers import answer_tokens
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.tokenize import Drop, TokenizeReport, refusal, tokenize_row, truncate_pairs
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import DataError, FpoError


@dataclass(frozen=True)
class Document:
    """One document."""

    tokens: np.ndarray  # int32 [L]
    keep: np.ndarray  # bool [L], positions that are trained on
    prompt: bytes = b""  # of a pair or chat: who shares it begins with the same activations


@dataclass(frozen=True)
class Documents:
    """All of a source, and what was left out of it."""

    items: tuple[Document, ...]
    kind: str  # text, chat, pairs
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        return fingerprint(self.items)


def fingerprint(items: Iterable[Document]) -> str:
    """sha256 over tokens and masks, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(np.int64(len(item.tokens)).tobytes())
        digest.update(item.tokens.astype("<i4").tobytes() + np.packbits(item.keep).tobytes())
    return digest.hexdigest()


def read_documents(
    source: str,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    kind: str = "auto",
    tokens: str = "all",
    limit: int | None = None,
    columns: data.Columns = data.DEFAULT_COLUMNS,
    hub: data.HubSplits = data.AUTO_SPLITS,
) -> Documents:
    """Read and tokenize a source.

    source: a .txt file (one document, or several between blank lines), or whatever
    `data.read_split` takes.
    kind: auto, text, chat or pairs; auto looks at the columns of the first row that can be read.
    tokens: all, or response (positions whose next token is the assistant's; not for text).
    limit: stop after about this many positions.
    columns, hub: names of the columns of pairs and of the split, as for `data.read_split`.
    A pair whose prompt leaves no room within max_length is dropped, as in training; a note counts.

    Raises DataError (rows that cannot be used, or none) and FpoError (no such source).
    """
    rows = _rows(source, hub)
    if kind == "auto":
        kind, rows = _told(rows, source, columns)
    if tokens == "response" and kind == "text":
        raise DataError(
            f"{source}: --tokens response wants chats or pairs, and these are plain texts. "
            "Use --tokens all."
        )
    sequences = partial(
        _sequences, kind=kind, tokenizer=tokenizer, max_length=max_length, tokens=tokens,
        columns=columns,
    )  # fmt: skip
    found, dropped, done = _gathered(rows, sequences, source, kind, limit)
    notes = TokenizeReport(done, len(found), max_length, 0, dropped=dropped).lines()
    items = _with_positions(found)
    late = len(found) - len(items) if kind == "chat" and tokens == "response" else 0
    if late:
        notes.append(
            f"{late} of {len(found)} chats are left out: no answer begins within {max_length} "
            "tokens (--max-seq-length)"
        )
    if not items:
        wanted = "a larger --max-seq-length, or shorter prompts"
        wanted = wanted if dropped or late else "longer texts"
        raise DataError(f"{source}: no position is left to train on; wanted {wanted}.", notes)
    shared = thin_beginning(items)
    if shared > 1:
        notes.append(
            f"all documents begin with the same {shared} tokens: they count in every tenth only"
        )
    return Documents(tuple(_with_positions(items)), kind, tuple(notes))


def _with_positions(items: Iterable[Document]) -> list[Document]:
    """Those with a position to train on: others cost a pass and give no row."""
    return [item for item in items if item.keep.any()]


def _gathered(
    rows: Iterable[data.RawRow],
    sequences: Callable[[data.RawRow], list[Document] | Drop],
    source: str,
    kind: str,
    limit: int | None,
) -> tuple[list[Document], tuple[Drop, ...], int]:
    """What the rows give, up to the limit; pairs that are too long; how many rows were read.

    Raises DataError naming every row that cannot be used.
    """
    items: list[Document] = []
    dropped: list[Drop] = []
    faults: list[tuple[str, DataError]] = []
    done = positions = 0
    for row in rows:
        done += 1
        try:
            new = sequences(row)
        except DataError as error:
            faults.append((row.where, error))
            continue
        if isinstance(new, Drop):
            dropped.append(new)
            continue
        items += new
        positions += sum(int(item.keep.sum()) for item in new)
        if limit is not None and positions >= limit:
            break
    if faults and kind == "pairs":
        raise refusal(source, faults, done)
    if faults:
        named = [f"{where}: {fault}" for where, fault in faults]
        raise DataError(f"{source}: {len(faults)} of {done} rows cannot be used as {kind}:", named)
    return items, tuple(dropped), done


def thin_beginning(items: Sequence[Document], every: int = 10) -> int:
    """Keep what all documents begin with (a system prompt) in one of `every`; its length.

    Equal beginnings give equal activations, and thousands of copies of one row teach nothing.
    """
    if len(items) < 2:
        return 0
    first, last = (f(items, key=lambda i: i.tokens.tolist()).tokens for f in (min, max))
    size = min(len(first), len(last))
    differs = np.flatnonzero(first[:size] != last[:size])
    shared = int(differs[0]) if len(differs) else size
    for at, item in enumerate(items):
        if at % every:
            item.keep[:shared] = False
    return shared


def _rows(source: str, hub: data.HubSplits) -> Iterable[data.RawRow]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".txt":
        data.find_splits(path, hub)  # refuses the names of splits, as for every one file
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FpoError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        parts = [part.strip() for part in content.split("\n\n") if part.strip()]
        if not parts:
            raise DataError(f"{path} holds no text.")
        return [data.RawRow({"text": t}, f"{path.name}[{i + 1}]", i) for i, t in enumerate(parts)]
    return data.iterate_raw(source, "train", hub)


def _told(
    rows: Iterable[data.RawRow], source: str, columns: data.Columns
) -> tuple[str, Iterator[data.RawRow]]:
    """What the rows are, by the first that can be read; and all of them."""
    rows, ahead = iter(rows), []
    for row in rows:
        ahead.append(row)
        if isinstance(row.record, Mapping):
            break
    faults = []
    for row in ahead:
        try:
            return documents.kind_of(documents.record_of(row), columns), chain(ahead, rows)
        except RowFault as fault:
            faults.append(f"{row.where}: {fault}")
    what = "there is no telling whether the rows are pairs, chats or texts"
    raise DataError(f"{source}: {what} (--data-kind says it):", faults)


def _sequences(
    row: data.RawRow,
    kind: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    tokens: str,
    columns: data.Columns,
) -> list[Document] | Drop:
    record = documents.record_of(row)
    if kind == "pairs":
        return _pair(row, tokenizer, max_length, tokens, columns)
    if kind == "chat":
        return [_chat(record, tokenizer, max_length, tokens, columns)]
    return _text(documents.text_of(record), tokenizer, max_length)


def _text(text: str, tokenizer: ChatTokenizer, max_length: int) -> list[Document]:
    """Windows of at most max_length tokens, each behind the tokenizer's BOS if it has one."""
    start = tokenizer.bos
    ids, size = tokenizer.document_tokens(text)[len(start) :], max_length - len(start)
    return [_whole([*start, *ids[at : at + size]]) for at in range(0, len(ids), size)]


def _whole(ids: Sequence[int] | np.ndarray) -> Document:
    keep = np.ones(len(ids), dtype=bool)
    keep[:1] = False
    return Document(np.array(ids, dtype=np.int32), keep)


def _chat(
    record: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    max_length: int,
    tokens: str,
    columns: data.Columns,
) -> Document:
    turns, tools = documents.chat_of(record, columns)
    begun = _beginning(turns)
    if tokens == "all":
        whole = _whole(tokenizer.conversation_tokens(turns, tools)[:max_length])
        return replace(whole, prompt=begun)
    ids, own = answer_tokens(turns, tokenizer, tools)
    whole = _whole(ids[:max_length])
    keep = np.zeros(len(whole.tokens), dtype=bool)
    keep[:-1] = own[1 : len(keep)]  # the next token is the assistant's
    return Document(whole.tokens, keep & whole.keep, begun)


def _beginning(turns: Sequence[Mapping[str, Any]]) -> bytes:
    """The turns of a chat as far as its first question."""
    asked = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    return json.dumps(turns[: asked + 1], sort_keys=True, default=str).encode()


def _pair(
    row: data.RawRow,
    tokenizer: ChatTokenizer,
    max_length: int,
    tokens: str,
    columns: data.Columns,
) -> list[Document] | Drop:
    whole = tokenize_row(data.parse_row(row.record, columns, row.where), tokenizer)
    done = truncate_pairs([whole], max_length)
    if done.report.dropped:
        return done.report.dropped[0]
    (pair,), sequences = done.pairs, []
    for response in pair.responses:
        sequence = _whole(np.concatenate([pair.prompt, response]))
        sequence = replace(sequence, prompt=pair.prompt.tobytes())
        if tokens == "response":
            sequence.keep[: len(pair.prompt) - 1] = False
            sequence.keep[-1] = False
        sequences.append(sequence)
    return sequences


def split_held_out(
    items: Iterable[Document], share: float, seed: int, most: int
) -> tuple[list[Document], list[Document]]:
    """(train, held out): documents at random until `share` of the positions, at most `most`.

    Both answers of a pair, all pairs of one prompt and all chats of one first question are on one
    side; a prompt with more than half of all positions is trained on.
    """
    items = list(items)
    groups: dict[bytes | int, list[int]] = {}
    for at, item in enumerate(items):
        groups.setdefault(item.prompt or at, []).append(at)
    together = list(groups.values())
    total = sum(int(item.keep.sum()) for item in items)
    wanted, got = min(share * total, most), 0
    chosen: list[list[int]] = []
    for group in np.random.default_rng([seed, 1]).permutation(len(together)):
        if got >= wanted or len(chosen) + 1 >= len(together):
            break
        size = sum(int(items[at].keep.sum()) for at in together[group])
        if size <= total / 2:
            chosen.append(together[group])
            got += size
    held = {at for group in chosen for at in group}
    return (
        [item for at, item in enumerate(items) if at not in held],
        [item for at, item in enumerate(items) if at in held],
    )
