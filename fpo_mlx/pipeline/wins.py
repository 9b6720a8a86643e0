"""How often the answers of one model beat those of another, by a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from fpo_mlx.intervals import wilson
from fpo_mlx.pairs.labels import comparisons
from fpo_mlx.pairs.records import Candidate, Candidates, Prompt
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.pairs_judge import Judge, open_rewarder
from fpo_mlx.records import BASE

SIDES = {"a": 1, "b": -1}  # which of two answers a verdict is for; 0 for any other


@dataclass(frozen=True)
class Wins:
    """Prompts on which a model's answer beats the base's. rate: a tie counts half."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, over prompts. With ties, which vary less, it is too wide."""
        return wilson(self.rate, self.wins + self.ties + self.losses)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rate": self.rate, "interval": list(self.interval)}


def wins_by(
    settings: JudgeConfig,
    asked: Sequence[Prompt],
    answers: Mapping[str, Sequence[str]],
    say: Say,
) -> dict[str, Wins]:
    """Of each model but the base, against the base. Equal answers tie, one that is empty loses.

    Raises: ConfigError, DataError, as `pairs judge --reward` does.
    """
    made = {}
    with ExitStack() as stack:
        _, _, judge = open_rewarder(settings, say, stack)
        for name, texts in answers.items():
            if name != BASE:
                sides = zip(asked, texts, answers[BASE], strict=True)
                found = [_better(judge, str(n), *one) for n, one in enumerate(sides, 1)]
                made[name] = Wins(found.count(1), found.count(0), found.count(-1))
    return made


def _better(judge: Judge, id: str, prompt: Prompt, one: str, two: str) -> int:
    """1 where the first answer is the better, -1 where the second is, else 0."""
    pair = Candidates(id, prompt, tuple(Candidate(text, 0, "stop") for text in (one, two)))
    pairs = comparisons(pair, neighbours=False, human=None, against_reference=False)
    if not pairs:
        return unjudged(one, two)
    (verdict,) = judge(pair, [(*pairs[0], "none")])
    return SIDES.get(verdict.verdict, 0)


def unjudged(one: str, two: str) -> int:
    """The same of what no judge is asked: equal texts, or an answer that says nothing."""
    return bool(one.strip()) - bool(two.strip())
