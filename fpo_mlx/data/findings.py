"""What can be wrong with pairs: its name, its severity, and what only many rows together show."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpo_mlx.data.rows import PreferenceRow, Turns
from fpo_mlx.records import TokenPair

# What becomes of a row: "refused" rows stop a run, "excluded" rows can be trained on (or are
# dropped by themselves) but are left out of the clean set, "warning" rows stay in it. The most
# severe first.
LEVELS: dict[str, str] = {
    "unreadable": "refused",
    "missing field": "refused",
    "empty field": "refused",
    "wrong type": "refused",
    "out of range": "refused",
    "role order": "refused",
    "no preference": "refused",
    "no shared prompt": "refused",
    "two prompts": "refused",
    "same response": "refused",
    "broken text": "refused",
    "template": "refused",
    "template variables": "refused",
    "answer part dropped": "refused",
    "beyond vocabulary": "refused",
    "prompt not a prefix": "refused",
    "duplicate": "excluded",
    "contradiction": "excluded",
    "leakage": "excluded",
    "dropped": "excluded",
    "same after cut": "excluded",
    "scores disagree": "warning",
    "messages as text": "warning",
    "cut": "warning",
    "no end of turn": "warning",
    "prompt part dropped": "warning",
    "prompt repeated": "warning",
    "added text": "warning",
    "control token": "warning",
    "odd unicode": "warning",
    "length bias": "warning",
}


@dataclass(frozen=True)
class Finding:
    kind: str  # a key of LEVELS
    split: str
    where: str  # "train.jsonl:12"; the name of the split for a finding about all of it
    what: str

    @property
    def level(self) -> str:
        return LEVELS[self.kind]

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Kind:
    """All findings of one kind: how many, and the first of them."""

    first: Finding
    count: int

    def __str__(self) -> str:
        return self._line(self.first.level)

    def of_run(self) -> str:
        """As a run says it, which trains on what `check` leaves out of the clean set."""
        return self._line("kept" if self.first.level == "excluded" else self.first.level)

    def _line(self, level: str) -> str:
        more = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{level:<8} {self.first.kind:<20} {self.count:>6}  {self.first}{more}"


def by_kind(findings: Iterable[Finding]) -> list[Kind]:
    """The most severe first."""
    counts: Counter[str] = Counter()
    firsts: dict[str, Finding] = {}
    for finding in findings:
        counts[finding.kind] += 1
        firsts.setdefault(finding.kind, finding)
    return [Kind(firsts[kind], counts[kind]) for kind in LEVELS if counts[kind]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What comparing rows with each other takes, without their texts."""

    where: str
    prompt: bytes  # digests of 16 bytes
    chosen: bytes
    rejected: bytes
    topic: bytes  # of the prompt without system message, letter case and spacing
    lengths: tuple[int, int]  # tokens, or characters where there is no tokenizer


def seen(row: PreferenceRow, pair: TokenPair | None) -> Seen:
    if pair is not None:
        lengths = (len(pair.chosen), len(pair.rejected))
    else:
        chosen, rejected = (
            sum(len(turn["content"]) for turn in turns) for turns in (row.chosen, row.rejected)
        )
        lengths = (chosen, rejected)
    prompt = _digest((row.prompt, row.tools))
    chosen, rejected = _digest(row.chosen), _digest(row.rejected)
    return Seen(row.where, prompt, chosen, rejected, topic_of(row), lengths)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]


def topic_of(row: PreferenceRow) -> bytes:
    """`Seen.topic`."""
    return topic_of_turns(row.prompt)


def topic_of_turns(prompt: Turns) -> bytes:
    """The same of a prompt alone."""
    topic = [
        (turn["role"], " ".join(turn["content"].casefold().split()))
        for turn in prompt
        if turn["role"] not in ("system", "developer")
    ]
    return _digest(topic)


def repeats(split: str, rows: Sequence[Seen]) -> Iterator[Finding]:
    """Duplicates (all but the first), and pairs that also stand there the other way round."""
    known: dict[tuple[bytes, bytes, bytes], str] = {}
    for row in rows:
        first = known.setdefault((row.prompt, row.chosen, row.rejected), row.where)
        if first != row.where:
            yield Finding("duplicate", split, row.where, f"the same pair as {first}")
    for row in rows:
        other = known.get((row.prompt, row.rejected, row.chosen))
        if other is not None:
            what = f"chosen and rejected are the other way round in {other}"
            yield Finding("contradiction", split, row.where, what)


def leakage(splits: Mapping[str, Sequence[tuple[bytes, str]]]) -> Iterator[Finding]:
    """Prompts that stand in two splits. The copy nearer to training is the one to leave out.

    splits: (topic, where) of each row, by split, training first.
    """
    places: dict[bytes, dict[str, str]] = defaultdict(dict)  # topic -> split -> where
    for name, rows in splits.items():
        for topic, where in rows:
            places[topic].setdefault(name, where)
    order = list(splits)
    for name, rows in splits.items():
        later = order[order.index(name) + 1 :]
        for topic, where in rows:
            held = places[topic]
            other = next((held[split] for split in later if split in held), None)
            if other is not None:
                yield Finding("leakage", name, where, f"its prompt is also in {other}")


def length_bias(split: str, lengths: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """A share that is both large (10 points off even) and no accident (3 standard errors)."""
    share, unequal = longer_chosen(lengths)
    off = abs(share - 0.5)
    if off >= 0.1 and off * 2 * math.sqrt(unequal) >= 3:
        side = "longer" if share > 0.5 else "shorter"
        portion = share if share > 0.5 else 1 - share
        yield Finding(
            "length bias",
            split,
            split,
            f"chosen is the {side} response in {portion:.0%} of {unequal} pairs; the model may "
            "learn length instead of the preference (objectives that normalise by length help)",
        )


def longer_chosen(lengths: Sequence[tuple[int, int]]) -> tuple[float, int]:
    """(share of pairs whose chosen response is the longer, pairs of unequal length)."""
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    return (sum(unequal) / len(unequal) if unequal else 0.5), len(unequal)
