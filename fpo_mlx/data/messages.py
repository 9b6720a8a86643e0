"""Conversations as people keep them, brought to one form: messages of {role, content, …}.

Taken are OpenAI's role/content, ShareGPT's from/value, content in parts of text, tool calls whose
arguments are a JSON text, what Arrow fills up with null, and a list of messages that went through
a CSV and came back as its JSON or Python text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_mlx.errors import DataError

Message = dict[str, Any]
Turns = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the assistant's, and its text is the call
_KEPT_KEYS = ("name", "tool_calls", "tool_call_id")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one thing under three names
# what begins like this was a list of messages once, whatever has become of it since
_BEGINS = re.compile(
    r"\s*(?:array\(\s*)?\[\s*(?:\{|dict\()\s*(['\"])(?:role|from|content|value)\1\s*:"
)
_ROLE_KEY = re.compile(r"['\"](?:role|from)['\"]\s*:")


class RowFault(DataError):
    """One row that cannot be used. `kind` is the name under which `check` counts it."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class NoPair(RowFault):
    """A row of another kind of data: answers of which none is said to be the better of two."""

    def __init__(self, kind: str, what: str, answers: int = 1) -> None:
        super().__init__(kind, what)
        self.answers = answers  # that the row has


def ways_on(faults: Sequence[DataError]) -> str:
    """What can be done with rows of these faults."""
    unpaired = [fault for fault in faults if isinstance(fault, NoPair)]
    if not unpaired:
        return "Mend them"
    begin = "Have"
    if any(fault.answers > 1 for fault in unpaired):
        begin = "Choose two of a row's answers, the better as chosen, the worse rejected, or have"
    anew = (
        f"{begin} the prompts answered anew (`fpo-mlx pairs generate --prompts FILE`) and pairs "
        "made of that (`fpo-mlx pairs build`)"
    )
    return anew if len(unpaired) == len(faults) else f"{anew}. Mend the others"


def messages(value: list | Mapping, name: str) -> Turns:
    """The messages of a list, or of one message alone. Empty system messages are left out.

    Raises RowFault.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not items:
        raise RowFault("empty field", f"{name} is an empty list")
    turns = tuple(_one(item, f"{name}[{at}]") for at, item in enumerate(items))
    said = tuple(turn for turn in turns if turn is not None)
    if not said:
        raise RowFault("empty field", f"{name} holds nothing but an empty system message")
    return said


def message(role: str, text: str, name: str, *, may_be_empty: bool = False) -> Message:
    """One message of plain text. Raises RowFault."""
    if not may_be_empty and not text.strip():
        raise RowFault("empty field", f"{name} is empty")
    check_encodable(text, name)
    return {"role": role, "content": text}


def conversation_in(text: str, name: str) -> list[Any] | None:
    """The list of messages that a text is the JSON or Python writing of; None for any other text.

    Raises RowFault for a text that begins like one and cannot be read.
    """
    if text.lstrip()[:1] not in ("[", "{", "a") or not _ROLE_KEY.search(text[:4096]):
        return None
    for read in (json.loads, _literal):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, Mapping) and _is_conversation(value.get("messages")):
            raise RowFault(
                "wrong type",
                f"{name} is the text of an object around `messages`; write the list of messages "
                "itself, and the tools into a column of their own",
            )
        items = [value] if isinstance(value, Mapping) else value
        return list(items) if _is_conversation(items) else None
    if _BEGINS.match(text):
        raise RowFault(
            "wrong type",
            f"{name} is a text that begins like a list of messages, but neither JSON nor Python "
            "can read it; write the list itself, not its text",
        )
    return None


def _literal(text: str) -> Any:
    """What Python, numpy or pandas printed. Nothing is run: literals only."""
    text = text.strip()
    if text.startswith("array("):
        text = re.sub(r",?\s*dtype=object\s*", "", text[len("array(") : text.rindex(")")])
    with warnings.catch_warnings():  # of an escape that is none
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(text)
        except SyntaxError:  # numpy writes no commas; within a repr no line ends
            return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "}, {", text))


def _is_conversation(items: Any) -> bool:
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(item, Mapping) and role_of(item) is not None for item in items)
    )


def role_of(item: Mapping) -> str | None:
    """The role of a message under our names, or None."""
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        return None
    if role.lower() in _CALL_ROLES:
        return "assistant"
    role = _OTHER_ROLES.get(role.lower(), role.lower())
    return role if role in ROLES else None


def _one(item: object, name: str) -> Message | None:
    """One message; None for a system message that says nothing."""
    if not isinstance(item, Mapping):
        raise RowFault("wrong type", f"{name} is {kind(item)}, wanted {{role, content}}")
    given = item.get("role") if item.get("role") is not None else item.get("from")
    if given is None:
        keys = ", ".join(map(str, item)) or "none"
        raise RowFault("missing field", f"{name} has no role (its keys: {short(keys)})")
    role = role_of({"role": given})
    if role is None:
        wanted = ", ".join(ROLES)
        raise RowFault("role order", f"{name} has the role {short(given)}, wanted one of {wanted}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    kept = {key: item[key] for key in (*_KEPT_KEYS, *THOUGHTS) if item.get(key)}
    calls = kept.pop("tool_calls", None) or item.get("function_call")
    if given.lower() in _CALL_ROLES:
        calls, content = content, None
    for key, extra in kept.items():
        if key in THOUGHTS and not isinstance(extra, str):
            raise RowFault("wrong type", f"{name}.{key} is {kind(extra)}, wanted a text")
        check_encodable(extra, f"{name}.{key}")
    if calls:
        kept["tool_calls"] = tool_calls(calls, f"{name}.tool_calls")
    if content is None and role in ("system", "developer"):
        return None
    if content is None and kept.get("tool_calls"):
        return {"role": role, "content": "", **kept}
    if content is None:
        raise RowFault("missing field", f"{name} has no content")
    text = _content(content, name)
    if role in ("system", "developer") and not text.strip():
        return None
    empty_is_fine = role == "tool" or "tool_calls" in kept
    return {**message(role, text, f"{name}.content", may_be_empty=empty_is_fine), **kept}


def _content(content: object, name: str) -> str:
    """A text, or the texts of a list of {"type": "text", "text": …} parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise RowFault("wrong type", f"{name}.content is {kind(content)}, wanted a text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RowFault("wrong type", f"{name}.content has a part that is not text")
        texts.append(text)
    return "".join(texts)


def tool_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, whatever they were written as. Raises RowFault."""
    value = from_json(value, name)
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list):
        items = [from_json(item, f"{name}[{at}]") for at, item in enumerate(items)]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RowFault("wrong type", f"{name} is {kind(value)}, wanted a list of calls")
    check_encodable(items, name)
    return [_call(item, f"{name}[{at}]") for at, item in enumerate(items)]


def _call(item: Mapping, name: str) -> dict[str, Any]:
    call = without_nulls(item)
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowFault("missing field", f"{name} names no function")
    text = inner.get("arguments")
    if isinstance(text, str):  # a null in a text was meant; Arrow fills up objects only
        inner["arguments"] = from_json(text, f"{name}.arguments") if text.strip() else {}
    if not isinstance(inner.get("arguments", {}), dict):
        raise RowFault("wrong type", f"{name}.arguments: wanted an object, or its JSON text")
    return call


def from_json(value: object, name: str) -> Any:
    """The value of a JSON (or Python) text; any other value as it is. Raises RowFault."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, _literal):
        try:
            return read(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise RowFault("wrong type", f"{name} is a text that is no JSON")


def without_nulls(value: Any) -> Any:
    """A copy without keys whose value is null: Arrow gives every object all keys of a column."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in value]
    return value


def check_encodable(value: object, name: str) -> None:
    """Raises RowFault for what UTF-8 or JSON cannot hold."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFault(
            "broken text", f"{name} has half a surrogate pair at character {error.start}"
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise RowFault("wrong type", f"{name} cannot be written as JSON") from None


def kind(value: object) -> str:
    """What a value is, in a user's words."""
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
    if value is None:
        return "missing"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "of no use")


def short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def squeezed(text: str) -> str:
    """A text whose white space is one space each: what two texts are compared by."""
    return " ".join(text.split())
