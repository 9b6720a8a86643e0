"""Whether a chat template wrote all that it was given, and what it wrote of its own.

White space does not count: templates trim and indent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fpo_mlx.data.messages import THOUGHTS

Message = Mapping[str, Any]


def lost_of_answer(turn: Message, text: str) -> str | None:
    """What of an answer is not in the text that the template made of it; None if all of it is."""
    packed = _Packed(text)
    if not packed.holds(turn["content"]):
        return f"its words {_first_lost(turn['content'], packed)!r}"
    for name in THOUGHTS:
        if name in turn and not packed.holds(turn[name]):
            return f"its {name}"
    for call in turn.get("tool_calls") or ():
        inner = call["function"] if isinstance(call.get("function"), Mapping) else call
        if not packed.holds(inner["name"]):
            return f"its call of the tool {inner['name']!r}"
        for leaf in _leaves(inner.get("arguments")):
            if not any(packed.holds(way) for way in _ways(leaf)):
                return f"{leaf!r} of its call of the tool {inner['name']!r}"
    return None


def lost_of_prompt(turns: Sequence[Message], tools: Any, text: str) -> str | None:
    """The same of a prompt. What an earlier answer thought may be left out: many templates do."""
    packed = _Packed(text)
    for at, turn in enumerate(turns):
        words = turn["content"]
        if turn["role"] == "assistant":
            words = words.rpartition("</think>")[2]
        if not packed.holds(words):
            return f"the words of message {at + 1} ({turn['role']})"
    for tool in tools or ():
        inner = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
        name = inner.get("name")
        if isinstance(name, str) and not packed.holds(name):
            return f"the tool {name!r}"
    return None


def added_before(turn: Message, text: str) -> str | None:
    """What the template writes before the words of an answer: "<think>\\n\\n</think>"; or None."""
    if any(turn.get(name) for name in (*THOUGHTS, "tool_calls")):
        return None
    words = turn["content"].strip()
    before, found, _ = text.partition(words)
    return before.strip() or None if found else None


class _Packed:
    """A text that is asked for its parts; packed together only where that is needed."""

    def __init__(self, text: str) -> None:
        self.text, self._packed = text, None

    def holds(self, part: str) -> bool:
        if part.strip() in self.text:
            return True
        if self._packed is None:
            self._packed = pack(self.text)
        return pack(part) in self._packed


def pack(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def _first_lost(words: str, packed: _Packed, most: int = 40) -> str:
    """The first line that is not there."""
    lines = (line.strip() for line in words.splitlines())
    lost = next((line for line in lines if line and not packed.holds(line)), words.strip())
    return lost if len(lost) <= most else f"{lost[: most - 1]}…"


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values of a JSON object, at any depth; what is empty is nowhere to be found."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield key
            yield from _leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one)
    elif value is not None and value != "":
        yield value


def _ways(leaf: Any) -> Iterator[str]:
    """How a template may write a value: plain, as JSON, as JSON within HTML (`tojson`)."""
    yield str(leaf)
    for ascii_only in (False, True):
        text = json.dumps(leaf, ensure_ascii=ascii_only)
        text = text[1:-1] if isinstance(leaf, str) else text
        yield text
        safe = text
        for char in "<>&'":
            safe = safe.replace(char, f"\\u{ord(char):04x}")
        yield safe
        yield text.replace("\\", "\\\\").replace('"', '\\"')  # a text within a text
