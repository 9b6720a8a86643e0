"""What an SAE is trained on: rows of text, chats or preference pairs, as token sequences.

Numpy only. A sequence carries a mask of the positions whose activations count. The first position
never does: a transformer parks attention there, with a norm tens of times the usual (attention
sinks, Xiao et al. 2023, arXiv 2309.17453; massive activations, Sun et al. 2024, 2402.17762).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx import data
from fpo_mlx.data.read import RawRow
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import DataError, FpoError

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@dataclass(frozen=True)
class Document:
    """One document."""

    tokens: np.ndarray  # int32 [L]
    keep: np.ndarray  # bool [L], positions that are trained on


@dataclass(frozen=True)
class Documents:
    """All of a source, and what was left out of it."""

    items: tuple[Document, ...]
    kind: str  # text, chat, pairs
    notes: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        return int(sum(item.keep.sum() for item in self.items))

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
) -> Documents:
    """Read and tokenize a source.

    source: a .txt file (one document, or several between blank lines), a .jsonl file, a folder
    with train.jsonl, or the id of a data set on the hub.
    kind: auto, text, chat or pairs; auto looks at the first row's columns.
    tokens: all, or response (positions whose next token is the assistant's; not for text).
    limit: stop after about this many positions.

    Raises DataError (rows that cannot be used, or none) and FpoError (no such source).
    """
    rows = _rows(source)
    found = _kind(rows[0].record, source) if kind == "auto" else kind
    if tokens == "response" and found == "text":
        raise DataError(
            f"{source}: --tokens response wants chats or pairs, and these are plain texts. "
            "Use --tokens all."
        )
    items: list[Document] = []
    faults: list[str] = []
    positions = 0
    for row in rows:
        try:
            new = _sequences(row, found, tokenizer, max_length, tokens)
        except DataError as error:
            faults.append(f"{row.where}: {error}")
            continue
        items += new
        positions += sum(int(item.keep.sum()) for item in new)
        if limit is not None and positions >= limit:
            break
    if faults:
        raise DataError(f"{source}: {len(faults)} rows cannot be used as {found}:", faults)
    if positions == 0:
        raise DataError(f"{source}: no position is left to train on; wanted longer texts.")
    shared = thin_beginning(items)
    note = f"all documents begin with the same {shared} tokens: they count in every tenth only"
    return Documents(tuple(items), found, (note,) if shared > 1 else ())


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


def _rows(source: str) -> list[RawRow]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".txt":
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FpoError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        parts = [part.strip() for part in content.split("\n\n") if part.strip()]
        if not parts:
            raise DataError(f"{path} holds no text.")
        return [RawRow({"text": t}, f"{path.name}[{i + 1}]", i) for i, t in enumerate(parts)]
    return data.read_raw(source, "train")


def _kind(record: Any, source: str) -> str:
    columns = set(record) if isinstance(record, Mapping) else set()
    if {"chosen", "rejected"} <= columns:
        return "pairs"
    if columns & set(CHAT_COLUMNS):
        return "chat"
    if columns & set(TEXT_COLUMNS):
        return "text"
    raise DataError(
        f"{source}: the first row has the columns {', '.join(sorted(columns)) or 'none'}. Wanted "
        "text (or content), messages (or conversations), or chosen and rejected; --data-kind says "
        "which one is meant."
    )


def _sequences(
    row: RawRow, kind: str, tokenizer: ChatTokenizer, max_length: int, tokens: str
) -> list[Document]:
    if row.fault:
        raise DataError(row.fault)
    if kind == "pairs":
        return _pair(row, tokenizer, max_length, tokens)
    if not isinstance(row.record, Mapping):
        raise DataError("not an object with named columns")
    if kind == "chat":
        return [_chat(_messages(row.record), tokenizer, max_length, tokens)]
    return _text(_first(row.record, TEXT_COLUMNS), tokenizer, max_length)


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise DataError(f"has none of the columns {', '.join(names)}")


def _text(text: Any, tokenizer: ChatTokenizer, max_length: int) -> list[Document]:
    """Windows of at most max_length tokens, each behind the tokenizer's BOS if it has one."""
    if not isinstance(text, str):
        raise DataError(f"the text is {type(text).__name__}, wanted a string")
    bos = getattr(tokenizer.raw, "bos_token_id", None)
    start = [bos] if bos is not None else []
    ids, size = tokenizer.text_tokens(text), max_length - len(start)
    return [_whole([*start, *ids[at : at + size]]) for at in range(0, len(ids), size)]


def _whole(ids: Sequence[int] | np.ndarray) -> Document:
    keep = np.ones(len(ids), dtype=bool)
    keep[:1] = False
    return Document(np.array(ids, dtype=np.int32), keep)


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    value = _first(record, CHAT_COLUMNS)
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value) or not value:
        raise DataError("the conversation is not a list of {role, content}")
    turns = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError("a message lacks a role or a text")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return turns


def _chat(
    turns: list[dict[str, Any]], tokenizer: ChatTokenizer, max_length: int, tokens: str
) -> Document:
    whole = _whole(tokenizer.conversation_tokens(turns)[:max_length])
    if tokens == "all":
        return whole
    keep = np.zeros(len(whole.tokens), dtype=bool)
    for at, turn in enumerate(turns):
        if turn["role"] == "assistant" and at:
            begin = len(tokenizer.prompt_tokens(turns[:at]))
            end = len(tokenizer.conversation_tokens(turns[: at + 1]))
            keep[begin - 1 : end - 1] = True  # the next token is the assistant's
    return Document(whole.tokens, keep & whole.keep)


def _pair(row: RawRow, tokenizer: ChatTokenizer, max_length: int, tokens: str) -> list[Document]:
    done = data.tokenize_rows([data.parse_row(row.record, where=row.where)], tokenizer, max_length)
    sequences = []
    for pair in done.pairs:
        for response in pair.responses:
            whole = _whole(np.concatenate([pair.prompt, response]))
            if tokens == "response":
                whole.keep[: len(pair.prompt) - 1] = False
                whole.keep[-1] = False
            sequences.append(whole)
    return sequences


def split_held_out(
    items: Iterable[Document], share: float, seed: int, most: int
) -> tuple[list[Document], list[Document]]:
    """(train, held out): documents at random until `share` of the positions, at most `most`."""
    items = list(items)
    total = sum(int(item.keep.sum()) for item in items)
    wanted, got = min(share * total, most), 0
    held: set[int] = set()
    for at in np.random.default_rng([seed, 1]).permutation(len(items)):
        if got >= wanted or len(held) + 1 >= len(items):
            break
        held.add(int(at))
        got += int(items[at].keep.sum())
    return (
        [item for at, item in enumerate(items) if at not in held],
        [item for at, item in enumerate(items) if at in held],
    )
