"""Every written form of a preference pair, turned into one record.

Forms (p, c, r = the prompt, chosen and rejected columns):
  strings        p, c, r are texts, with an optional system column
  conversational p, c, r are lists of messages; c and r hold only the answer (TRL)
  whole          c and r are whole conversations that share a beginning; p may be absent, the same
                 beginning as a list, or the text of one of its user turns (UltraFeedback-binarized)
  transcript     c and r (and p, if any) are texts of "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.errors import DataError
from fpo_mlx.records import NO_FACTS, PairFacts

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_TRANSCRIPT = re.compile(r"\s*Human:.*\r?\n\r?\nAssistant:", re.DOTALL)
_TURN = re.compile(r"(?:\A|\r?\n\r?\n)(Human|Assistant):[ \t]*")

Message = dict[str, Any]
Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Columns:
    """The names under which a data set keeps the parts of a pair."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str = "system"
    tools: str = "tools"
    agreement: str = "agreement"
    weight: str = "weight"
    scores: tuple[str, str] | None = None  # of chosen and rejected; None: they are not asked for


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class PreferenceRow:
    """One pair: prompt + chosen and prompt + rejected are the two conversations."""

    prompt: Turns  # at least one message, the last from the user (or a tool)
    chosen: Turns  # at least one message, the first and the last from the assistant
    rejected: Turns
    where: str  # "train.jsonl:12"
    index: int  # row number within its split, from 0
    tools: tuple[dict[str, Any], ...] | None = None
    facts: PairFacts = NO_FACTS


class RowFault(DataError):
    """One row that cannot be used. `kind` is the name under which `check` counts it."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def parse_row(
    record: object, columns: Columns = DEFAULT_COLUMNS, where: str = "", index: int = 0
) -> PreferenceRow:
    """Read one row in any of the forms above.

    Raises RowFault, whose text says what is wrong with the row (not where: the caller knows).
    """
    if not isinstance(record, Mapping):
        raise RowFault("wrong type", f"a row is an object with named columns, not {_kind(record)}")
    chosen, rejected = (_column(record, name) for name in (columns.chosen, columns.rejected))
    if type(chosen) is not type(rejected):
        raise RowFault(
            "wrong type",
            f"{columns.chosen} is {_kind(chosen)} but {columns.rejected} is {_kind(rejected)}; "
            "both must have the same form",
        )
    prompt = record.get(columns.prompt)
    if isinstance(chosen, str):
        turns = _from_texts(prompt, chosen, rejected, columns)
    elif isinstance(chosen, list):
        turns = _from_lists(prompt, chosen, rejected, columns)
    else:
        raise RowFault(
            "wrong type",
            f"{columns.chosen} is {_kind(chosen)}, wanted a text or a list of messages",
        )
    system, tools = _system(record, columns), _tools(record, columns)
    prompt, facts = _with_system(turns[0], system), _facts(record, columns)
    row = PreferenceRow(prompt, turns[1], turns[2], where, index, tools, facts)
    _check_roles(row)
    if row.chosen == row.rejected:
        raise RowFault("same response", "chosen and rejected are the same")
    return row


def _from_texts(prompt: Any, chosen: str, rejected: str, columns: Columns) -> tuple[Turns, ...]:
    """The turns of a row whose responses are texts."""
    if _is_transcript(chosen) and _is_transcript(rejected):
        whole = (_transcript(chosen, columns.chosen), _transcript(rejected, columns.rejected))
        return _shared_beginning(prompt, *whole, columns)
    if prompt is None:
        raise RowFault(
            "missing field",
            f"no {columns.prompt!r}; {columns.chosen} and {columns.rejected} are plain texts, "
            "which need one",
        )
    if isinstance(prompt, str) and _is_transcript(prompt):
        turns = _transcript(prompt, columns.prompt)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns = turns[:-1]  # "…\n\nAssistant:" waits for the answer
        chosen, rejected = chosen.strip(), rejected.strip()
    else:
        turns = _prompt_turns(prompt, columns.prompt)
    answers = ((columns.chosen, chosen), (columns.rejected, rejected))
    return turns, *((_message("assistant", text, name),) for name, text in answers)


def _from_lists(prompt: Any, chosen: list, rejected: list, columns: Columns) -> tuple[Turns, ...]:
    """The turns of a row whose responses are lists of messages."""
    left, right = _messages(chosen, columns.chosen), _messages(rejected, columns.rejected)
    if left[0]["role"] != "assistant" or right[0]["role"] != "assistant":
        return _shared_beginning(prompt, left, right, columns)
    if prompt is None:
        raise RowFault(
            "missing field",
            f"no {columns.prompt!r}, and the conversations in {columns.chosen} and "
            f"{columns.rejected} begin with the assistant",
        )
    return _prompt_turns(prompt, columns.prompt), left, right


def _shared_beginning(
    prompt: Any, chosen: Turns, rejected: Turns, columns: Columns
) -> tuple[Turns, ...]:
    """Split two whole conversations where they part."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowFault("same response", "chosen and rejected are the same conversation")
    if shared == 0:
        raise RowFault(
            "no shared prompt",
            "the conversations in chosen and rejected differ from their first message on, so they "
            "answer different prompts",
        )
    # an assistant turn that both share just before they part (tool use) belongs to the prompt's
    # side only if the user or a tool spoke last
    while shared > 1 and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    begin = chosen[:shared]
    if prompt is not None:
        _check_prompt_fits(prompt, begin, columns)
    return begin, chosen[shared:], rejected[shared:]


def _check_prompt_fits(prompt: Any, begin: Turns, columns: Columns) -> None:
    """A prompt column beside whole conversations must say what they say."""
    turns = _prompt_turns(prompt, columns.prompt)
    if isinstance(prompt, str) and not _is_transcript(prompt):
        said = [_squeeze(turn["content"]) for turn in begin]
        text = _squeeze(prompt)
        fits = any(text == one for one in said) or text in _squeeze(" ".join(said))
    else:
        spoken = tuple(turn for turn in turns if turn["content"])
        fits = begin[: len(spoken)] == spoken or begin[-len(spoken) :] == spoken
    if not fits:
        raise RowFault(
            "no shared prompt",
            f"{columns.prompt} is not in the conversations of {columns.chosen} and "
            f"{columns.rejected}: {_short(prompt)} against {_short(begin[-1]['content'])}",
        )


def _prompt_turns(prompt: Any, name: str) -> Turns:
    if isinstance(prompt, str):
        if _is_transcript(prompt):
            return _transcript(prompt, name)
        return (_message("user", prompt, name),)
    if isinstance(prompt, list):
        return _messages(prompt, name)
    raise RowFault("wrong type", f"{name} is {_kind(prompt)}, wanted a text or a list of messages")


def _messages(value: list, name: str) -> Turns:
    if not value:
        raise RowFault("empty field", f"{name} is an empty list")
    return tuple(_one_message(item, f"{name}[{at}]") for at, item in enumerate(value))


def _one_message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowFault("wrong type", f"{name} is {_kind(item)}, wanted {{role, content}}")
    role, content = item.get("role"), item.get("content")
    if role is None:
        keys = ", ".join(map(str, item)) or "none"
        raise RowFault("missing field", f"{name} has no role (its keys: {_short(keys)})")
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault(
            "role order", f"{name} has the role {_short(role)}, wanted one of {', '.join(ROLES)}"
        )
    kept = {key: item[key] for key in _KEPT_KEYS if item.get(key) is not None}
    for key, extra in kept.items():
        _check_encodable(extra, f"{name}.{key}")
    if content is None and kept.get("tool_calls"):
        return {"role": role, "content": "", **kept}
    if content is None:
        raise RowFault("missing field", f"{name} has no content")
    text = _content(content, name)
    empty_is_fine = role == "tool" or bool(kept.get("tool_calls"))
    return {**_message(role, text, f"{name}.content", may_be_empty=empty_is_fine), **kept}


def _content(content: object, name: str) -> str:
    """A text, or the texts of a list of {"type": "text", "text": …} parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFault("wrong type", f"{name}.content is {_kind(content)}, wanted a text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RowFault("wrong type", f"{name}.content has a part that is not text")
        texts.append(text)
    return "".join(texts)


def _message(role: str, text: str, name: str, *, may_be_empty: bool = False) -> Message:
    if not may_be_empty and not text.strip():
        raise RowFault("empty field", f"{name} is empty")
    _check_encodable(text, name)
    return {"role": role, "content": text}


def _check_encodable(value: object, name: str) -> None:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFault(
            "broken text", f"{name} has half a surrogate pair at character {error.start}"
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise RowFault("wrong type", f"{name} cannot be written as JSON") from None


def _is_transcript(text: str) -> bool:
    return _TRANSCRIPT.match(text) is not None


def _transcript(text: str, name: str) -> Turns:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …". Only a last "Assistant:" may be empty."""
    parts = _TURN.split(text.strip())[1:]  # role, text, role, text, …
    roles = [{"Human": "user", "Assistant": "assistant"}[role] for role in parts[::2]]
    texts = [part.strip() for part in parts[1::2]]
    last = len(roles) - 1
    return tuple(
        _message(
            role, said, f"{name}, turn {at + 1}", may_be_empty=at == last and role == "assistant"
        )
        for at, (role, said) in enumerate(zip(roles, texts, strict=True))
    )


def _system(record: Mapping, columns: Columns) -> str | None:
    system = record.get(columns.system)
    if system is None or system == "":
        return None
    if not isinstance(system, str):
        raise RowFault("wrong type", f"{columns.system} is {_kind(system)}, wanted a text")
    _check_encodable(system, columns.system)
    return system if system.strip() else None


def _with_system(prompt: Turns, system: str | None) -> Turns:
    if system is None or prompt[0] == {"role": "system", "content": system}:
        return prompt
    if prompt[0]["role"] in ("system", "developer"):
        raise RowFault("role order", "the system column and the prompt's system message differ")
    return ({"role": "system", "content": system}, *prompt)


def _tools(record: Mapping, columns: Columns) -> tuple[dict[str, Any], ...] | None:
    tools = record.get(columns.tools)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowFault("wrong type", f"{columns.tools} is a text that is no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault("wrong type", f"{columns.tools} is {_kind(tools)}, wanted a list of objects")
    _check_encodable(tools, columns.tools)
    return tuple(dict(tool) for tool in tools)


def _facts(record: Mapping, columns: Columns) -> PairFacts:
    """What the row says of its pair; where it says nothing, what changes nothing."""
    agreement = _number(record, columns.agreement, 0.0, 1.0)
    weight = _number(record, columns.weight, 0.0)
    gap = 0.0
    if columns.scores is not None:
        scores = [_number(record, name) for name in columns.scores]
        if None in scores:
            name = columns.scores[scores.index(None)]
            raise RowFault("missing field", f"no {name!r}, which --score-margin needs")
        gap = scores[0] - scores[1]  # type: ignore[operator]
    return PairFacts(
        NO_FACTS.agreement if agreement is None else agreement,
        NO_FACTS.weight if weight is None else weight,
        gap,
    )


def _number(
    record: Mapping, name: str, low: float = -math.inf, high: float = math.inf
) -> float | None:
    """A finite number from low to high, or None where the row has none."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowFault("wrong type", f"{name} is {_short(value)}, wanted a finite number")
    if not low <= value <= high:
        bounds = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise RowFault("out of range", f"{name} is {value:g}, wanted {bounds}")
    return float(value)


def _check_roles(row: PreferenceRow) -> None:
    """System first and once, user and assistant in turn, tools after the assistant."""
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise RowFault("role order", f"{name} does not end with the assistant's answer")
        if not answer[-1]["content"].strip() and not answer[-1].get("tool_calls"):
            raise RowFault("empty field", f"{name} ends with an empty answer")
        if answer[0]["role"] != "assistant" or any(turn["role"] == "user" for turn in answer):
            raise RowFault(
                "role order",
                f"{name} has a user's turn where only the assistant's can be learned; what comes "
                "before the answer belongs in the prompt",
            )
        _check_order((*row.prompt, *answer), name)
    if row.prompt[-1]["role"] not in ("user", "tool"):
        raise RowFault(
            "role order",
            f"the prompt ends with {row.prompt[-1]['role']!r}; the user (or a tool) speaks last",
        )


_MAY_FOLLOW = {
    "start": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_order(turns: Sequence[Message], name: str) -> None:
    before = "start"
    for turn in turns:
        if turn["role"] not in _MAY_FOLLOW[before]:
            raise RowFault(
                "role order",
                f"prompt and {name}: {turn['role']!r} comes after {before!r}, wanted "
                f"{' or '.join(_MAY_FOLLOW[before])}",
            )
        before = turn["role"]


def _column(record: Mapping, name: str) -> Any:
    value = record.get(name)
    if value is None:
        keys = ", ".join(map(str, record)) or "none"
        raise RowFault("missing field", f"no {name!r} (the row has: {_short(keys)})")
    if value == "" or value == []:
        raise RowFault("empty field", f"{name} is empty")
    return value


def _kind(value: object) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
    if value is None:
        return "missing"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "of no use")


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _squeeze(text: str) -> str:
    return " ".join(text.split())
