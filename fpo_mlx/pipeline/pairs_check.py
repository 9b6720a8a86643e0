"""What is wrong with files of candidates and verdicts, and what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fpo_mlx.config import DataConfig
from fpo_mlx.errors import DataError
from fpo_mlx.pairs.records import (
    HUMAN,
    PERSON,
    Candidates,
    Key,
    Verdict,
    is_on,
    parse_candidates,
    parse_verdict,
)
from fpo_mlx.pairs.summary import JudgeSummary, summarise
from fpo_mlx.storage import lines

Record = TypeVar("Record", Candidates, Verdict)
Answers = dict[str, list[tuple[int, str]]]  # of each prompt: tokens and digest of each

# "refused" lines stop the commands that read them; "lost" ones are read and make no pair; "note"
# says what a reader may not expect. The most severe first.
LEVELS: dict[str, str] = {
    "no such line": "refused",
    "unknown prompt": "lost",
    "unknown answer": "lost",
    "other answers": "lost",
    "one answer only": "lost",
    "equal answers": "lost",
    "empty answer": "lost",
    "cut answer": "lost",
    "unreadable verdict": "lost",
    "one order only": "lost",
    "prompt again": "note",
    "verdict again": "note",
}


@dataclass(frozen=True)
class Kind:
    """All findings of one kind in one file: how many, and the first of them."""

    level: str
    kind: str
    count: int
    first: str  # where, and what


@dataclass
class _Found:
    counts: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    lines: int = 0

    def add(self, kind: str, where: str, what: str) -> None:
        self.counts[kind] += 1
        self.firsts.setdefault(kind, f"{where}: {what}")

    def records(
        self, path: Path, parse: Callable[[Any, str], Record]
    ) -> Iterator[tuple[str, Record]]:
        """Where it stands and what it says, of each line that can be read; the rest is noted."""
        for number, _, line in lines.read_lines(path):
            self.lines, where = self.lines + 1, f"{path.name}:{number}"
            try:
                one = parse(lines.decode(line, where), where)
            except DataError as error:
                self.add("no such line", where, str(error).removeprefix(f"{where}: "))
            else:
                yield where, one

    def kinds(self) -> tuple[Kind, ...]:
        return tuple(
            Kind(level, kind, self.counts[kind], self.firsts[kind])
            for kind, level in LEVELS.items()
            if self.counts[kind]
        )


@dataclass(frozen=True)
class FileCheck:
    """figures: of candidates, or nothing; judges: of verdicts, by name."""

    path: str
    holds: str  # "candidates" or "verdicts"
    lines: int
    kinds: tuple[Kind, ...]
    figures: dict[str, float] = field(default_factory=dict)
    judges: dict[str, JudgeSummary] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        return sum(kind.count for kind in self.kinds if kind.level == "refused")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "refused": self.refused}


def pairs_file(data: DataConfig) -> str | None:
    """ "candidates" or "verdicts" by the first line that says; None where it is another file, such
    as one of finished pairs, whose own columns may have these names."""
    path = Path(data.data)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    for _, _, line in lines.read_lines(path):
        try:
            record = lines.decode(line, path.name)
        except DataError:
            continue
        if data.chosen_feature in record or data.rejected_feature in record:
            return None
        names = {"candidates": "candidates", "verdict": "verdicts"}
        return next((what for name, what in names.items() if name in record), None)
    return None


def pairs_check(candidates: Path | None, verdicts: Sequence[Path]) -> list[FileCheck]:
    """Every line of the files looked at, one in memory at a time; no file is changed.

    Without candidates what a verdict is about is not looked at.
    Raises: FpoError for a file that cannot be read.
    """
    answers: Answers = {}
    checks = [_candidates(candidates, answers)] if candidates else []
    return checks + [_verdicts(path, answers if candidates else None) for path in verdicts]


def _candidates(path: Path, answers: Answers) -> FileCheck:
    found, figures = _Found(), Counter()
    for where, one in found.records(path, parse_candidates):
        if one.id in answers:
            found.add("prompt again", where, f"id {one.id} stood above; this line counts")
        answers[one.id] = [(answer.tokens, answer.digest) for answer in one.candidates]
        for kind, what in _of_candidates(one):
            found.add(kind, where, what)
        figures["answers"] += len(one.candidates)
        figures["tokens"] += sum(answer.tokens for answer in one.candidates)
        figures["cut"] += sum(answer.cut for answer in one.candidates)
        figures["of persons"] += sum(answer.model == HUMAN for answer in one.candidates)
    means = _means(figures, len(answers))
    return FileCheck(str(path), "candidates", found.lines, found.kinds(), means)


def _means(figures: Counter[str], prompts: int) -> dict[str, float]:
    answers = figures["answers"]
    return {
        "prompts": prompts, "answers": answers, "of persons": figures["of persons"],
        "tokens per answer": figures["tokens"] / max(1, answers),
        "share cut by length": figures["cut"] / max(1, answers),
    }  # fmt: skip


def _of_candidates(one: Candidates) -> Iterator[tuple[str, str]]:
    texts = [answer.text.strip() for answer in one.candidates]
    if len(texts) < 2:
        yield "one answer only", "nothing to compare it with"
    elif len(set(texts)) == 1:
        yield "equal answers", f"all {len(texts)} answers are the same"
    for number, answer in enumerate(one.candidates):
        if not texts[number]:
            yield "empty answer", f"candidate {number} says nothing"
        if answer.cut:
            yield (
                "cut answer",
                (
                    f"candidate {number} ended at {answer.tokens} tokens, by length; `pairs build` "
                    "leaves it out"
                ),
            )


def _verdicts(path: Path, answers: Answers | None) -> FileCheck:
    found = _Found()
    known: dict[Key, Verdict] = {}
    places: dict[tuple[str, int, int, str], str] = {}
    unread: dict[Key, tuple[str, str]] = {}
    for where, one in found.records(path, parse_verdict):
        if one.key in known and known[one.key].verdict != "unreadable":
            found.add("verdict again", where, f"{one.judge} said it above; this line counts")
        what = None if answers is None else _unknown(one, answers)
        if what is not None:
            found.add(what[0], where, what[1])
            if what[0] == "other answers":
                continue  # it counts for the candidates that it is on
        known[one.key] = replace(one, raw="")
        places[one.id, one.a, one.b, one.judge] = where
        unread.pop(one.key, None)  # it was asked again
        if what is None and one.verdict == "unreadable":
            unread[one.key] = where, f"{one.judge} said neither letter"
    for where, why in unread.values():
        found.add("unreadable verdict", where, why)
    for key, orders in _orders(known.values()).items():
        if len(orders) == 1 and orders != {"none"}:
            found.add("one order only", places[key], f"{key[3]} judged {orders.pop()} alone")
    judges = summarise(known.values(), None if answers is None else _lengths(answers))
    return FileCheck(str(path), "verdicts", found.lines, found.kinds(), judges=judges)


def _lengths(answers: Answers) -> Callable[[str], list[int]]:
    return lambda id: [tokens for tokens, _ in answers.get(id, ())]


def _unknown(one: Verdict, answers: Answers) -> tuple[str, str] | None:
    there = answers.get(one.id)
    if there is None:
        return "unknown prompt", f"id {one.id[:40]} is not among the candidates"
    if max(one.a, one.b) >= len(there):
        return "unknown answer", f"a {one.a}, b {one.b} of {len(there)} candidates"
    if not is_on(one, [digest for _, digest in there]):
        return "other answers", f"{one.judge} judged answers that stood there before"
    return None


def _orders(known: Any) -> dict[tuple[str, int, int, str], set[str]]:
    """By comparison and judge; a person is asked once, and a verdict that says nothing is none."""
    orders: dict[tuple[str, int, int, str], set[str]] = {}
    for one in known:
        if one.judge != PERSON and one.verdict not in ("unreadable", "skip"):
            orders.setdefault((one.id, one.a, one.b, one.judge), set()).add(one.order)
    return orders
