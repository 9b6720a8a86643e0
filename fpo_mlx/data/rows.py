"""Every written form of a preference pair, turned into one record.

Forms (p, c, r = the prompt, chosen and rejected columns):
  strings        p, c, r are texts, with an optional system column
  conversational p, c, r are lists of messages; c and r hold only the answer (TRL), or one message
  whole          c and r are whole conversations that share a beginning; p may be absent, the same
                 beginning as a list, or the text of one of its user turns (UltraFeedback-binarized)
  transcript     c and r (and p, if any) are texts of "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic)
and the layouts of `layouts`. `messages` says what a message may look like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.data import layouts
from fpo_mlx.data.messages import (
    Message,
    RowFault,
    Turns,
    check_encodable,
    conversation_in,
    from_json,
    squeezed,
    without_nulls,
)
from fpo_mlx.data.messages import kind as _kind
from fpo_mlx.data.messages import message as _message
from fpo_mlx.data.messages import messages as _messages
from fpo_mlx.data.messages import short as _short
from fpo_mlx.records import NO_FACTS, PairFacts

_TRANSCRIPT = re.compile(r"\s*Human:.*\r?\n\r?\nAssistant:", re.DOTALL)
_TURN = re.compile(r"(?:\A|\r?\n\r?\n)(Human|Assistant):[ \t]*")


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
    chosen: Turns  # one message of the assistant: every token of a response is the model's own
    rejected: Turns
    where: str  # "train.jsonl:12"
    index: int  # row number within its split, from 0
    tools: tuple[dict[str, Any], ...] | None = None
    scores: tuple[float, float] | None = None  # chosen's and rejected's, where the row has them
    as_text: tuple[str, ...] = ()  # columns whose list of messages was written as a text
    facts: PairFacts = NO_FACTS
    variables: Mapping[str, Any] | None = None  # of the template, as TRL's rows have them


def as_object(record: object) -> Mapping:
    """Raises RowFault."""
    if not isinstance(record, Mapping):
        raise RowFault("wrong type", f"a row is an object with named columns, not {_kind(record)}")
    return record


def parse_row(
    record: object, columns: Columns = DEFAULT_COLUMNS, where: str = "", index: int = 0
) -> PreferenceRow:
    """Read one row in any of the forms above.

    Raises RowFault, whose text says what is wrong with the row (not where: the caller knows).
    """
    record = as_object(record)
    variables = layouts.variables_of(record)
    facts, record = _facts(record, columns), layouts.as_pair(record, columns)
    record, as_text = _lists_for_texts(record, columns)
    chosen, rejected = _answers(record, columns)
    prompt = layouts.whole_prompt(record, columns)
    parts: Any = _from_texts if isinstance(chosen, str) else _from_lists
    turns = _parted(*parts(record, prompt, chosen, rejected, columns))
    system, tools = system_of(record, columns), tools_of(record, columns)
    scores = layouts.scores_of(record)
    prompt = with_system(turns[0], system)
    more = (tools, scores, as_text, facts, variables)
    row = PreferenceRow(prompt, turns[1], turns[2], where, index, *more)
    _check_roles(row)
    if row.chosen == row.rejected:
        raise RowFault("same response", "chosen and rejected are the same")
    return row


def _lists_for_texts(record: Mapping, columns: Columns) -> tuple[Mapping, tuple[str, ...]]:
    """The record with lists of messages where their JSON or Python text stood; and those columns.

    Raises RowFault.
    """
    names = (columns.prompt, columns.chosen, columns.rejected, *layouts.PROMPTS)
    texts = {name: text for name in names if isinstance(text := record.get(name), str)}
    found = {name: conversation_in(text, name) for name, text in texts.items()}
    lists = {name: turns for name, turns in found.items() if turns is not None}
    return ({**record, **lists}, tuple(lists)) if lists else (record, ())


def _answers(record: Mapping, columns: Columns) -> tuple[Any, Any]:
    """chosen and rejected: both texts, or both lists of messages. Raises RowFault."""
    found = []
    for name in (columns.chosen, columns.rejected):
        value = _column(record, name)
        found.append([value] if isinstance(value, Mapping) else value)
    chosen, rejected = found
    if type(chosen) is not type(rejected):
        raise RowFault(
            "wrong type",
            f"{columns.chosen} is {_kind(chosen)} but {columns.rejected} is {_kind(rejected)}; "
            "both must have the same form",
        )
    if not isinstance(chosen, str | list):
        raise RowFault(
            "wrong type",
            f"{columns.chosen} is {_kind(chosen)}, wanted a text or a list of messages",
        )
    return chosen, rejected


def _parted(prompt: Turns, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Turns that both answers begin with belong to the prompt: there is no preference in them."""
    shared = _shared(chosen, rejected)
    return (*prompt, *chosen[:shared]), chosen[shared:], rejected[shared:]


def _shared(chosen: Turns, rejected: Turns) -> int:
    """How many turns both begin with, up to the last word of the user or a tool among them."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def _from_texts(
    record: Mapping, prompt: Any, chosen: str, rejected: str, columns: Columns
) -> tuple[Turns, Turns, Turns]:
    """The turns of a row whose responses are texts."""
    if _is_transcript(chosen) and _is_transcript(rejected):
        whole = (_transcript(chosen, columns.chosen), _transcript(rejected, columns.rejected))
        return _shared_beginning(prompt, *whole, columns)
    if prompt is None:
        prompt = layouts.prompt_of(record, columns)
    if prompt is None:
        raise RowFault(
            "missing field",
            f"no {columns.prompt!r}; {columns.chosen} and {columns.rejected} are plain texts, "
            "which need one",
        )
    if isinstance(prompt, str) and _is_transcript(prompt):
        turns = _spoken(_transcript(prompt, columns.prompt))
        chosen, rejected = chosen.strip(), rejected.strip()
    else:
        turns = _prompt_turns(prompt, columns.prompt)
    left = (_message("assistant", chosen, columns.chosen),)
    return turns, left, (_message("assistant", rejected, columns.rejected),)


def _from_lists(
    record: Mapping, prompt: Any, chosen: list, rejected: list, columns: Columns
) -> tuple[Turns, Turns, Turns]:
    """The turns of a row whose responses are lists of messages."""
    left, right = _messages(chosen, columns.chosen), _messages(rejected, columns.rejected)
    if left[0]["role"] != "assistant" or right[0]["role"] != "assistant":
        return _shared_beginning(prompt, left, right, columns)
    if prompt is None:
        prompt = layouts.prompt_of(record, columns)
    if prompt is None:
        raise RowFault(
            "missing field",
            f"no {columns.prompt!r}, and the conversations in {columns.chosen} and "
            f"{columns.rejected} begin with the assistant",
        )
    return _prompt_turns(prompt, columns.prompt), left, right


def _shared_beginning(
    prompt: Any, chosen: Turns, rejected: Turns, columns: Columns
) -> tuple[Turns, Turns, Turns]:
    """Split two whole conversations where they part."""
    if chosen == rejected:
        raise RowFault("same response", "chosen and rejected are the same conversation")
    shared = _shared(chosen, rejected)
    if shared == 0:
        raise RowFault(
            "no shared prompt",
            "the conversations in chosen and rejected differ from their first message on, so they "
            "answer different prompts",
        )
    begin = chosen[:shared]
    if prompt is not None:
        _check_prompt_fits(prompt, begin, columns)
    return begin, chosen[shared:], rejected[shared:]


def _check_prompt_fits(prompt: Any, begin: Turns, columns: Columns) -> None:
    """A prompt column beside whole conversations must say what they say."""
    turns = _prompt_turns(prompt, columns.prompt)
    if isinstance(prompt, str) and not _is_transcript(prompt):
        said = [squeezed(turn["content"]) for turn in begin]
        text = squeezed(prompt)
        fits = any(text == one for one in said) or text in squeezed(" ".join(said))
    else:
        spoken = _spoken(turns)
        fits = begin[: len(spoken)] == spoken or begin[-len(spoken) :] == spoken
    if not fits:
        raise RowFault(
            "no shared prompt",
            f"{columns.prompt} is not in the conversations of {columns.chosen} and "
            f"{columns.rejected}: {_short(prompt)} against {_short(begin[-1]['content'])}",
        )


def _spoken(turns: Turns) -> Turns:
    """Without a last "Assistant:" of a transcript, which waits for the answer."""
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _prompt_turns(prompt: Any, name: str) -> Turns:
    if isinstance(prompt, str):
        if _is_transcript(prompt):
            return _transcript(prompt, name)
        return (_message("user", prompt, name),)
    if isinstance(prompt, list) or (isinstance(prompt, Mapping) and {"role", "from"} & set(prompt)):
        return _messages(prompt, name)
    raise RowFault("wrong type", f"{name} is {_kind(prompt)}, wanted a text or a list of messages")


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


def system_of(record: Mapping, columns: Columns) -> str | None:
    """The system column; None where it says nothing. Raises RowFault."""
    system = record.get(columns.system)
    if not layouts.filled(system):
        return None
    match system:
        case [{"role": "system", "content": str(text)}]:
            system = text
    if not isinstance(system, str):
        raise RowFault("wrong type", f"{columns.system} is {_kind(system)}, wanted a text")
    check_encodable(system, columns.system)
    return system if system.strip() else None


def with_system(prompt: Turns, system: str | None) -> Turns:
    """Raises RowFault where the prompt has another system message."""
    if system is None or prompt[0] == {"role": "system", "content": system}:
        return prompt
    if prompt[0]["role"] in ("system", "developer"):
        raise RowFault("role order", "the system column and the prompt's system message differ")
    return ({"role": "system", "content": system}, *prompt)


def tools_of(record: Mapping, columns: Columns) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row, as objects. Raises RowFault."""
    tools = record.get(columns.tools)
    if isinstance(tools, str) and tools.strip():
        tools = from_json(tools, columns.tools)
    if not layouts.filled(tools) or not tools or isinstance(tools, str):
        return None
    if isinstance(tools, list):
        tools = [from_json(tool, f"{columns.tools}[{at}]") for at, tool in enumerate(tools)]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault("wrong type", f"{columns.tools} is {_kind(tools)}, wanted a list of objects")
    check_encodable(tools, columns.tools)
    return tuple(without_nulls(tool) for tool in tools)


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
    """A finite number from low to high, or the text of one; None where the row has none."""
    value = layouts.as_number(record.get(name))
    if not layouts.filled(value):
        return None
    if not layouts.is_finite(value):
        found = _short(record[name])
        raise RowFault("wrong type", f"{name} is {found}, wanted a finite number")
    if not low <= value <= high:
        bounds = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise RowFault("out of range", f"{name} is {value:g}, wanted {bounds}")
    return value


def _check_roles(row: PreferenceRow) -> None:
    """System first and once, user and assistant in turn, tools after the assistant."""
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not answer or answer[-1]["role"] != "assistant":
            raise RowFault("role order", f"{name} does not end with the assistant's answer")
        if not answer[-1]["content"].strip() and not answer[-1].get("tool_calls"):
            raise RowFault("empty field", f"{name} ends with an empty answer")
        if len(answer) > 1:
            raise RowFault("role order", _several_turns(name, answer))
        _check_order((*row.prompt, *answer), name)
    if row.prompt[-1]["role"] not in ("user", "tool"):
        raise RowFault(
            "role order",
            f"the prompt ends with {row.prompt[-1]['role']!r}; the user (or a tool) speaks last",
        )


def _several_turns(name: str, answer: Turns) -> str:
    roles = ", ".join(turn["role"] for turn in answer)
    other = next((turn["role"] for turn in answer if turn["role"] != "assistant"), "")
    whose = f"the {other}'s words, which are not the model's," if other else "several answers"
    return (
        f"{name} has {len(answer)} turns behind where the two part ({roles}), and {whose} would be "
        "scored with it. Compare one answer: what comes before it belongs in the prompt"
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
    if value is None or value != value:
        if name in record:  # as pandas writes an empty cell
            raise RowFault("empty field", f"{name} is {'null' if value is None else 'NaN'}")
        keys = ", ".join(map(str, record)) or "none"
        raise RowFault("missing field", f"no {name!r} (the row has: {_short(keys)})")
    if value == "" or value == []:
        raise RowFault("empty field", f"{name} is empty")
    return value
