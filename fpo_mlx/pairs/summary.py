"""What can be said of judges: flips, position, length, ties, and agreement with a person."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fpo_mlx.pairs.labels import Label, by_prompt, resolve
from fpo_mlx.pairs.records import PERSON, Verdict

SIDES = ("a", "b")


@dataclass(frozen=True)
class JudgeSummary:
    """Shares are of what they can be of; None where that is nothing."""

    verdicts: int
    unreadable: int
    compared: int  # two answers that were decided
    ties: int  # of those, both bad among them
    flip_rate: float | None  # of comparisons in both orders: the verdicts name different answers
    first_share: float | None  # of verdicts for one answer: the one that was shown first
    longer_share: float | None  # of labels for one answer: the longer one
    agreement: float | None = None  # with a person's labels of the same two answers
    kappa: float | None = None  # Cohen's, over a, b and tie
    both_judged: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Lengths = Callable[[str], list[int]]  # tokens of each candidate of a prompt; asked once of each


def summarise(
    verdicts: Iterable[Verdict], lengths: Lengths | None, against: Iterable[Verdict] = ()
) -> dict[str, JudgeSummary]:
    """By judge. lengths: None where the answers are not known; against: a person's votes."""
    person = {
        (id, label.a, label.b): _word(label)
        for id, group in by_prompt(v for v in against if v.judge == PERSON).items()
        for label in _labels(group).values()
    }
    judges: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        judges[verdict.judge].append(verdict)
    return {name: _of_one(found, lengths, person) for name, found in judges.items()}


def _of_one(
    verdicts: list[Verdict], lengths: Lengths | None, person: Mapping[tuple[str, int, int], str]
) -> JudgeSummary:
    flips, first, longer, ties, compared = [], [], [], 0, 0
    said: list[tuple[str, str]] = []
    for id, group in by_prompt(verdicts).items():
        orders: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
        for v in group:
            if v.verdict not in ("unreadable", "skip") and v.edited is None:
                orders[v.a, v.b][v.order] = v.verdict
            if v.order != "none" and v.verdict in SIDES:
                first.append(v.order[0] == v.verdict)
        flips += [o["ab"] != o["ba"] for o in orders.values() if {"ab", "ba"} <= set(o)]
        tokens = None if lengths is None else lengths(id)
        for (a, b), label in _labels(group).items():
            if tokens is not None and max(a, b) >= len(tokens):
                continue  # of another file's candidates
            compared += 1
            ties += label.verdict not in SIDES
            if label.verdict in SIDES and tokens and tokens[a] != tokens[b]:
                longer.append((tokens[a] > tokens[b]) == (label.verdict == "a"))
            if (id, a, b) in person:
                said.append((_word(label), person[id, a, b]))
    agreement = _mean([one == two for one, two in said])
    return JudgeSummary(
        len(verdicts), sum(v.verdict == "unreadable" for v in verdicts), compared, ties,
        _mean(flips), _mean(first), _mean(longer), agreement, cohen_kappa(said), len(said),
    )  # fmt: skip


def _labels(group: Iterable[Verdict]) -> dict[tuple[int, int], Label]:
    """Of one judge's verdicts of one prompt."""
    pairs: dict[tuple[int, int], list[Verdict]] = defaultdict(list)
    for v in group:
        pairs[v.a, v.b].append(v)
    return {pair: label for pair, found in pairs.items() if (label := resolve(found))}


def _word(label: Label) -> str:
    return label.verdict if label.verdict in SIDES else "tie"


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def cohen_kappa(said: list[tuple[str, str]]) -> float | None:
    """(p_o - p_e) / (1 - p_e); None without pairs, or where chance alone would agree always.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales", eq. 1.
    """
    n = len(said)
    if not n:
        return None
    observed = sum(one == two for one, two in said) / n
    words = {word for pair in said for word in pair}
    chance = sum(
        sum(one == word for one, _ in said) * sum(two == word for _, two in said) for word in words
    ) / (n * n)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def self_agreement(verdicts: Iterable[Verdict]) -> tuple[int, int]:
    """(same, asked twice) of a person's votes that came again with sides swapped."""
    same = twice = 0
    for group in by_prompt(v for v in verdicts if v.judge == PERSON).values():
        orders: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
        for v in group:
            if v.verdict != "skip" and v.edited is None:
                orders[v.a, v.b][v.order] = v.verdict
        for found in orders.values():
            if {"ab", "ba"} <= set(found):
                twice += 1
                same += found["ab"] == found["ba"]
    return same, twice
