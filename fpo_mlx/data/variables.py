"""Rows that bring variables of the chat template, as TRL's do: a run has one set for all rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, TypeVar

from fpo_mlx.data.findings import Finding
from fpo_mlx.data.layouts import VARIABLES
from fpo_mlx.data.messages import RowFault
from fpo_mlx.errors import ConfigError, DataError

KIND = "template variables"


class Varied(Protocol):
    """What renders with variables of the template."""

    @property
    def template_kwargs(self) -> Mapping[str, Any]: ...
    def with_variables(self, more: Mapping[str, Any]) -> Self: ...


Run = TypeVar("Run", bound=Varied)


class VariablesFault(RowFault):
    """A row whose own variables make another text than those of the run."""

    def __init__(self, own: Mapping[str, Any], run: Varied, wanted: Mapping[str, Any]) -> None:
        what = f"{VARIABLES} is {dict(own)}, and the run has {dict(run.template_kwargs)}"
        whole = json.dumps(dict(wanted), ensure_ascii=False, default=str)
        super().__init__(
            KIND,
            f"{what} for all rows. Give --chat-template-args '{whole}', or take the column out",
        )
        self.own = {name: value for name, value in own.items() if name in wanted}
        self.among_others = f"{what}; other rows have other values: take the column out"


def other_text(
    own: Mapping[str, Any], run: Run, texts: Callable[[Run], Sequence[str]]
) -> RowFault | None:
    """Of a row that its own variables would write otherwise. texts: of the row; raises DataError.

    Values that change nothing (a default, a variable of another model's template) are no fault.
    """
    try:
        other = run.with_variables(own)
    except ConfigError as error:
        return RowFault(KIND, f"{VARIABLES}: {error}")
    if other.template_kwargs == run.template_kwargs:
        return None
    if _or_none(texts, other) == _or_none(texts, run):
        return None
    return VariablesFault(own, run, other.template_kwargs)


def _or_none(texts: Callable[[Run], Sequence[str]], run: Run) -> Sequence[str] | None:
    try:
        return texts(run)
    except DataError:
        return None


class Asked:
    """What the rows of a set ask for: where they differ, no variables of a run suit them all."""

    def __init__(self) -> None:
        self._values: dict[str, set[str]] = defaultdict(set)
        self._names: set[str] = set()  # that some row was refused for
        self._among_others: dict[str, str] = {}

    def take(self, own: Mapping[str, Any] | None) -> None:
        """Of a row that is used."""
        for name, value in (own or {}).items():
            self._values[name].add(json.dumps(value, sort_keys=True, default=str))

    def refuse(self, fault: DataError | None) -> None:
        """Of a row that is not."""
        if isinstance(fault, VariablesFault):
            self.take(fault.own)
            self._names |= fault.own.keys()
            self._among_others[str(fault)] = fault.among_others

    def findings(self, found: list[Finding]) -> list[Finding]:
        """With the advice that can be followed."""
        said = self._said()
        return [replace(f, what=said[f.what]) if f.what in said else f for f in found]

    def faults(self, found: Iterable[tuple[str, DataError]]) -> list[tuple[str, DataError]]:
        """The same of faults, each behind its place."""
        said = self._said()
        return [
            (where, RowFault(KIND, said[str(fault)]) if str(fault) in said else fault)
            for where, fault in found
        ]

    def _said(self) -> Mapping[str, str]:
        """What is to be said for what was."""
        mixed = any(len(self._values[name]) > 1 for name in self._names)
        return self._among_others if mixed else {}
