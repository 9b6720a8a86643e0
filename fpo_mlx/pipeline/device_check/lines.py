"""What a check of the device found: one line each, with what it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["ok", "WRONG", "seen"]


@dataclass(frozen=True)
class Line:
    """One finding. bound: the most that the value may be; None: a figure without a wanted value."""

    part: str  # of the check: size, kernels, start, updates, launches, speed, memory
    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    note: str = ""  # what makes the figure another one, in a few words

    @property
    def verdict(self) -> Verdict:
        if self.bound is None:
            return "seen"
        return "ok" if self.value <= self.bound else "WRONG"  # not a number is wrong

    @property
    def text(self) -> str:
        words = [f"{self.value:.3g}", self.unit]
        if self.bound is not None:
            words.append(f"(at most {self.bound:.3g})")
        return " ".join([*filter(None, words), *([f"[{self.note}]"] if self.note else [])])

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "verdict": self.verdict}
