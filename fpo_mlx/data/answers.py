"""Where in a chat of several turns the assistant's own tokens are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fpo_mlx.data.tokenize import Tokenizer
from fpo_mlx.errors import DataError

Message = Mapping[str, Any]
# stands for an answer where a template is asked what it writes around one
_MARK = "qzxanswer{}xzq"


class ChatTokens(Tokenizer, Protocol):
    """A tokenizer that can also say where in the text each token stands."""

    def encode_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...


def answer_tokens(
    turns: Sequence[Message], tokenizer: ChatTokens, tools: Any = None
) -> tuple[list[int], np.ndarray]:
    """(tokens of the conversation, bool [L]: whether each is the assistant's).

    An answer is its words and what ends its turn; the header before it is not.
    Raises DataError where the template writes answers so that their place cannot be told.
    """
    text = tokenizer.render(turns, tools)
    ids, places = tokenizer.encode_places(text)
    own = np.zeros(len(ids), dtype=bool)
    spans: list[tuple[int, int]] | None = None
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant" and at]
    for number, at in enumerate(answers):
        edges = _by_renderings(turns, at, ids, tokenizer, tools)
        if edges is not None:
            own[slice(*edges)] = True
            continue
        if spans is None:
            spans = _by_marks(turns, answers, text, tokenizer, tools)
        own |= _covered(spans[number], text, places, tokenizer)
    return ids, own


def _by_renderings(
    turns: Sequence[Message], at: int, ids: list[int], tokenizer: ChatTokens, tools: Any
) -> tuple[int, int] | None:
    """(first, end) of answer `at`, where the shorter renderings are how the whole one begins."""
    try:
        begin, end = tokenizer.encode(
            [
                tokenizer.render(turns[:at], tools, prompt=True),
                tokenizer.render(turns[: at + 1], tools),
            ]
        )
    except DataError:  # a template may refuse a part of what it takes as a whole
        return None
    if ids[: len(begin)] != begin or ids[: len(end)] != end:
        return None
    return len(begin), len(end)


def _by_marks(
    turns: Sequence[Message], answers: list[int], text: str, tokenizer: ChatTokens, tools: Any
) -> list[tuple[int, int]]:
    """Places of the answers' words in the text, from what the template writes around marks."""
    marks = {at: _MARK.format(n) for n, at in enumerate(answers)}
    marked = [
        {**turn, "content": marks[at]} if at in marks else turn for at, turn in enumerate(turns)
    ]
    frame = tokenizer.render(marked, tools)
    spans: list[tuple[int, int]] = []
    place = 0
    for at, mark in marks.items():
        before, found, frame = frame.partition(mark)
        words = next(_found(turns[at]["content"], text, place + len(before)), None)
        plain = not turns[at].get("tool_calls") and text[place : place + len(before)] == before
        if not found or words is None or not plain:
            raise DataError(
                f"the chat template writes message {at + 1} (assistant) otherwise than it was "
                "given, or otherwise than alone, so that there is no telling which tokens are "
                "the answer's. Use --tokens all, or another template (--chat-template FILE)"
            )
        place += len(before)
        spans.append((place, place + len(words)))
        place += len(words)
    return spans


def _found(words: str, text: str, at: int) -> Iterator[str]:
    """The words as they stand at this place: as they are, or trimmed."""
    for way in (words, words.strip(), words.lstrip(), words.rstrip(), words.strip("\n")):
        if way and text.startswith(way, at):
            yield way


def _covered(
    span: tuple[int, int], text: str, places: list[tuple[int, int]], tokenizer: ChatTokens
) -> np.ndarray:
    """bool [L]: tokens of the span, and the control token that ends its turn right behind it."""
    begin, end = span
    starts, ends = (np.array(side) for side in zip(*places, strict=True))
    own = (ends > begin) & (starts < end)
    last = int(np.flatnonzero(own)[-1]) if own.any() else -1
    if 0 <= last < len(places) - 1 and text[slice(*places[last + 1])] in tokenizer.control_tokens:
        own[last + 1] = True
    return own
