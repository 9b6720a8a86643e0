"""Texts to judge an SAE on: answers of preference pairs, whole chats, or plain texts, as tokens.

`documents` says which of them a row is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fpo_mlx.data import documents
from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.read import parse_raw
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns
from fpo_mlx.data.tokenize import Tokenizer, tokenize_row
from fpo_mlx.errors import DataError
from fpo_mlx.records import Passage


class TextTokenizer(Tokenizer, Protocol):
    """A chat tokenizer that also takes plain text."""

    def document_tokens(self, text: str) -> list[int]: ...
    def conversation_tokens(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None
    ) -> list[int]: ...


def read_passages(
    read: Callable[[], Iterable[RawRow]],
    tokenizer: TextTokenizer,
    count: int,
    max_tokens: int,
    columns: Columns = DEFAULT_COLUMNS,
) -> list[Passage]:
    """At most `count` passages of at most max_tokens, from rows spread evenly over the data.

    read: gives all rows from the first on; called twice, so that they need not be in memory.

    A pair gives both of its answers, each behind the prompt. A chat or a text is looked at from its
    second position on: the first, a text's BOS where the tokenizer has one, is no place to judge an
    SAE at (see `sae_fit`).

    Raises DataError for a row that cannot be used, or when nothing fits into max_tokens.
    """
    total = sum(1 for _ in read())
    tries = [spread(range(total), wanted) for wanted in (math.ceil(count / 2), count)]
    wanted = {at for picked in tries for at in picked}
    rows = {at: row for at, row in enumerate(read()) if at in wanted}
    found: list[Passage] = []
    for picked in tries:  # a pair gives two
        found = [p for at in picked for p in _passages(rows[at], tokenizer, max_tokens, columns)]
        if len(found) >= count:
            break
    if not found:
        raise DataError(
            f"none of the rows that were looked at fits into {max_tokens} tokens (the first: "
            f"{rows[0].where}). Raise --max-seq-length."
        )
    return spread(found, count)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]


def _passages(
    row: RawRow, tokenizer: TextTokenizer, max_tokens: int, columns: Columns
) -> Iterator[Passage]:
    try:
        record = documents.record_of(row)
        kind = documents.kind_of(record, columns)
        if kind != "pairs":
            yield from _whole(_tokens(record, kind, tokenizer, columns), max_tokens, row.where)
            return
        pair = tokenize_row(parse_raw(row, columns), tokenizer)
    except DataError as error:  # RowFault too
        raise DataError(f"{row.where}: {error}") from error
    for response in pair.responses:
        kept = response[: max_tokens - len(pair.prompt)]
        if len(pair.prompt) < max_tokens:
            yield Passage(pair.prompt, kept, row.where)


def _tokens(
    record: Mapping[str, Any], kind: str, tokenizer: TextTokenizer, columns: Columns
) -> list[int]:
    """Tokens of a chat or a text. Raises RowFault."""
    if kind == "chat":
        return tokenizer.conversation_tokens(*documents.chat_of(record, columns))
    return tokenizer.document_tokens(documents.text_of(record))


def _whole(tokens: list[int], max_tokens: int, where: str) -> Iterator[Passage]:
    """Positions from the second to the last but one: each has a next token to predict."""
    kept = np.array(tokens[:max_tokens], dtype=np.int32)
    if len(kept) > 2:
        yield Passage(kept[:2], kept[2:], where)
