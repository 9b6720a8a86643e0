"""What all verdicts together say of two answers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fpo_mlx.pairs.records import PERSON, Candidates, Verdict

VERSION = re.compile("[@:][0-9a-f]{8}$")  # behind a judge's name: of its file, weights, criteria


@dataclass(frozen=True, slots=True)
class Label:
    """Of candidates a < b. verdict: "a", "b", "tie" or "both_bad".

    agreement: 0.5 to 1, how sure the judges are of it together; scores where judges gave them.
    """

    a: int
    b: int
    verdict: str
    agreement: float = 1.0
    score_a: float | None = None
    score_b: float | None = None
    edited: str | None = None  # a person's text that beats both
    person: bool = False  # a person said it


def comparisons(
    found: Candidates, *, neighbours: bool, human: int | None, against_reference: bool,
    cut: bool = True,
) -> list[tuple[int, int]]:  # fmt: skip
    """Pairs a < b of a prompt's answers to judge; equal texts and empty ones are none.

    human: the number of the person's answer, which is compared only `against_reference`.
    cut: with answers that ended by length.
    """
    said = [
        n for n, one in enumerate(found.candidates)
        if one.text.strip() and n != human and (cut or not one.cut)
    ]  # fmt: skip
    if against_reference:
        wanted = [] if human is None else [(n, human) for n in said]
    else:
        wanted = combined(said, neighbours=neighbours)
    texts = [one.text.strip() for one in found.candidates]
    return [(min(a, b), max(a, b)) for a, b in wanted if texts[a] != texts[b]]


def combined(numbers: Sequence[int], *, neighbours: bool) -> list[tuple[int, int]]:
    """Each with each, or with the two beside it in a ring."""
    if not neighbours:
        return [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
    ends = [(numbers[0], numbers[-1])] if len(numbers) > 2 else []
    return [*zip(numbers, numbers[1:], strict=False), *ends]


def by_prompt(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.id].append(_ascending(verdict))
    return groups


def newest_judges(
    verdicts: Iterable[Verdict], asked: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The judges that count, and which of them came in place of each older one of its name.

    A person is none of them. Where no time is known the later line is the newer. asked: the newest
    of its name, whoever spoke last, for one that is asked again has nothing to add.
    """
    last: dict[str, float] = {}
    for verdict in verdicts:
        if verdict.judge != PERSON:
            last[verdict.judge] = max(last.get(verdict.judge, 0.0), verdict.time or 0.0)
    of_name = {VERSION.sub("", judge): judge for judge in sorted(last, key=last.__getitem__)}
    of_name |= {VERSION.sub("", asked): asked} if asked in last else {}
    newer = {judge: of_name[VERSION.sub("", judge)] for judge in last}
    return [one for one in last if newer[one] == one], {a: b for a, b in newer.items() if a != b}


def labels_of(verdicts: Sequence[Verdict]) -> list[Label]:
    """One label for each two answers of one prompt that was decided. A person's word is the last,
    the scores are the judges' all the same.

    Several judges: the side that more than half of them choose, else a tie.
    """
    groups: dict[tuple[int, int], dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        groups[verdict.a, verdict.b][verdict.judge].append(verdict)
    found = []
    for judges in groups.values():
        of_each = {name: label for name, v in judges.items() if (label := resolve(v))}
        person = of_each.pop(PERSON, None)
        label = _together(list(of_each.values()))
        if person and label:
            person = replace(person, score_a=label.score_a, score_b=label.score_b)
        if said := person or label:
            found.append(said)
    return found


def resolve(verdicts: Sequence[Verdict]) -> Label | None:
    """What one judge says of a and b; None where it has not decided.

    A judge that is shown two answers is asked in both orders, and where they differ it is a tie:
    position bias grows as answers come closer (arXiv 2406.07791). A person is asked once.
    """
    last = max(verdicts, key=lambda v: v.time or 0.0)
    a, b = last.a, last.b
    if last.judge == PERSON:
        if edits := [v for v in verdicts if v.edited is not None]:  # it may come again
            own = max(edits, key=lambda v: v.time or 0.0)
            return Label(a, b, "both_bad", edited=own.edited, person=True)
        said = {v.verdict for v in verdicts} - {"skip", "unreadable"}
        if not said:
            return None
        return Label(a, b, said.pop() if len(said) == 1 else "tie", person=True)
    if last.order == "none":
        if last.verdict in ("skip", "unreadable"):
            return None
        return Label(a, b, last.verdict, _sure(last.verdict, last.p), last.score_a, last.score_b)
    orders = {v.order: v for v in verdicts if v.order != "none"}
    if len(orders) < 2 or any(v.verdict in ("skip", "unreadable") for v in orders.values()):
        return None
    first, second = orders["ab"], orders["ba"]
    if first.verdict != second.verdict:
        return Label(a, b, "tie", 0.5)
    p = None if first.p is None or second.p is None else (first.p + second.p) / 2
    return Label(a, b, first.verdict, _sure(first.verdict, p))


def _sure(verdict: str, p: float | None) -> float:
    """How sure a judge is of its verdict. p: that a is the better one, where it says so."""
    if p is None or verdict not in ("a", "b"):
        return 1.0
    return max(0.5, p if verdict == "a" else 1 - p)


def _together(labels: Sequence[Label]) -> Label | None:
    if len(labels) < 2:
        return labels[0] if labels else None
    scored = next((one for one in labels if one.score_a is not None), labels[0])
    for side in ("a", "b", "both_bad"):
        agree = [label for label in labels if label.verdict == side]
        if 2 * len(agree) > len(labels):
            share = sum(label.agreement for label in agree)
            share += sum(1 - label.agreement for label in labels if label.verdict in _other(side))
            share += 0.5 * sum(label.verdict == "tie" for label in labels)
            return replace(scored, verdict=side, agreement=max(0.5, share / len(labels)))
    return replace(scored, verdict="tie", agreement=0.5)


def _other(side: str) -> tuple[str, ...]:
    return {"a": ("b",), "b": ("a",)}.get(side, ())


def _ascending(verdict: Verdict) -> Verdict:
    """The same with a < b."""
    if verdict.a < verdict.b:
        return verdict
    swap = {"a": "b", "b": "a"}
    return replace(
        verdict, a=verdict.b, b=verdict.a, verdict=swap.get(verdict.verdict, verdict.verdict),
        order={"ab": "ba", "ba": "ab"}.get(verdict.order, verdict.order),
        p=None if verdict.p is None else 1 - verdict.p,
        score_a=verdict.score_b, score_b=verdict.score_a,
        texts=verdict.texts and "-".join(reversed(verdict.texts.split("-"))),
    )  # fmt: skip
