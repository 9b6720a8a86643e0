"""What a row of an SAE's data is: a preference pair, a chat or a plain text; and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fpo_mlx.data import layouts
from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.messages import RowFault, Turns, conversation_in, kind, messages
from fpo_mlx.data.rows import Columns, as_object, system_of, tools_of, with_system

COLUMNS = {"chat": ("messages", "conversations", "conversation"), "text": ("text", "content")}


def record_of(row: RawRow) -> Mapping[str, Any]:
    """Raises RowFault for a row that could not be read, or is no object."""
    if row.fault:
        raise RowFault("unreadable", row.fault)
    return as_object(row.record)


def kind_of(record: Mapping[str, Any], columns: Columns) -> str:
    """pairs, chat or text, by the names of its columns. Raises RowFault for none of them."""
    sides, pair, no_pair = (columns.chosen, columns.rejected), record, ""
    try:
        pair = layouts.as_pair(record, columns)
    except RowFault as fault:  # a text may have columns that look like half a pair
        if any(layouts.filled(record.get(side)) for side in sides):
            raise
        no_pair = f" As a pair it is refused: {fault}."
    kinds = {"pairs": sides} | COLUMNS
    if set(sides) <= set(pair) and any(layouts.filled(pair[side]) for side in sides):
        return "pairs"
    for found, names in COLUMNS.items():
        if any(layouts.filled(record.get(name)) for name in names):
            return found
    for found, names in kinds.items():
        if set(names) & set(record):
            return found
    raise RowFault(
        "missing field",
        f"the row has the columns {', '.join(sorted(map(str, record))) or 'none'}.{no_pair} Wanted "
        "text (or content), messages (or conversations), or chosen and rejected (or what "
        "--chosen-feature and --rejected-feature name)",
    )


def chat_of(
    record: Mapping[str, Any], columns: Columns
) -> tuple[Turns, tuple[dict[str, Any], ...] | None]:
    """The turns of a chat and its tools. Raises RowFault."""
    name, value = _first(record, COLUMNS["chat"])
    if isinstance(value, str):
        value = conversation_in(value, name)
    if not isinstance(value, list):
        raise RowFault(
            "wrong type", f"{name} is {kind(record[name])}, wanted a list of {{role, content}}"
        )
    turns = with_system(messages(value, name), system_of(record, columns))
    return turns, tools_of(record, columns)


def text_of(record: Mapping[str, Any]) -> str:
    """Raises RowFault."""
    name, value = _first(record, COLUMNS["text"])
    if not isinstance(value, str):
        raise RowFault("wrong type", f"{name} is {kind(value)}, wanted a text")
    return value


def _first(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first of these columns that is filled, or at least there."""
    there = [name for name in names if name in record]
    if not there:
        raise RowFault("missing field", f"has none of the columns {', '.join(names)}")
    name = next((name for name in there if layouts.filled(record[name])), there[0])
    return name, record[name]
