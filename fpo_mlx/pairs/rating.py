"""What a person is shown next, and what becomes of each click. The page asks; this decides."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpo_mlx.errors import DataError
from fpo_mlx.pairs.labels import comparisons
from fpo_mlx.pairs.records import (
    HUMAN,
    PERSON,
    CandidateFile,
    Verdict,
    open_candidates,
    parse_verdict,
    read_verdicts,
)
from fpo_mlx.pairs.summary import self_agreement
from fpo_mlx.storage import lines

UNDONE = "undone"  # `raw` of a vote that was taken back: it is shown again
AGAIN = 20  # one comparison in so many comes again with its sides swapped
LATER = 15  # and so many others lie between
PACE = 20  # votes over which the pace is measured
PAUSE = 120.0  # seconds without a vote that are no part of the pace
CHOICES = ("first", "second", "tie", "both_bad", "skip")


class Refused(Exception):
    """A request of the page that cannot be. The page shows the text and asks for the next."""


@dataclass(frozen=True, slots=True)
class Item:
    """Two answers as they are shown. order: "ab" shows a on the left."""

    id: str
    a: int
    b: int
    order: str
    again: bool = False

    @property
    def name(self) -> str:
        return f"{self.id}:{self.a}:{self.b}:{self.order}"

    @property
    def shown(self) -> tuple[int, int]:
        return (self.a, self.b) if self.order == "ab" else (self.b, self.a)


class Rating:
    """One file of candidates, one of votes; every vote is on disk before the next is shown.

    Raises: DataError and FpoError for files that cannot be read or written.
    """

    def __init__(
        self, candidates: Path, output: Path, *, per_prompt: int = 1, seed: int = 0,
        keep_cut: bool = False, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._found = open_candidates(candidates)
        self._items = queue(self._found, per_prompt, seed, keep_cut)
        if not self._items:
            raise DataError(_nothing(candidates, keep_cut or not queue(self._found, 1, seed, True)))
        self._by_name = {item.name: item for item in self._items}
        self._clock = clock
        self._votes: dict[str, Verdict] = {}  # by the item's name; none that was taken back
        self._history: list[str] = []  # names in the order of their votes
        self._times: list[float] = []  # of votes of this sitting
        if output.exists():
            self._read(output)
        self._at = 0
        self._writer = lines.LineWriter(output)

    def close(self) -> None:
        self._writer.close()

    def next(self) -> dict[str, Any]:
        """What the page shows: an item, or that all is done. Texts as they are."""
        while self._at < len(self._items) and self._is_decided(self._items[self._at]):
            self._at += 1
        state = self._state()
        if self._at == len(self._items):
            return state | {"done": True}
        item = self._items[self._at]
        one = self._found.get(item.id)
        texts = [one.candidates[n].text for n in item.shown]
        turns = [{"role": t["role"], "text": str(t["content"])} for t in one.prompt.turns]
        return state | {"done": False, "name": item.name, "prompt": turns, "answers": texts}

    def vote(self, name: str, choice: str, edited: tuple[int, str] | None = None) -> None:
        """choice: one of CHOICES; edited: a side, 0 or 1, and the person's text in its place.

        Raises: Refused where the item is unknown or was decided in another tab.
        """
        item = self._by_name.get(name)
        if item is None:
            raise Refused("This comparison is not in the file.")
        if name in self._votes:
            raise Refused("This one was decided already, perhaps in another tab.")
        if choice not in CHOICES:
            raise Refused(f"{choice!r} is no choice.")
        side = {"first": item.order[0], "second": item.order[1]}.get(choice, choice)
        text = None
        if edited is not None:
            text, was = edited[1], self._found.get(item.id).candidates[item.shown[edited[0]]].text
            if not text.strip() or _in_editor(text) == _in_editor(was):
                raise Refused("The text was not changed.")
            side = "both_bad"
        self._write(item, side, "", text)
        self._history.append(name)
        self._times.append(self._clock())

    def undo(self) -> bool:
        """Take back the last vote; False where there is none."""
        if not self._history:
            return False
        name = self._history[-1]
        item = self._by_name[name]
        self._write(item, "skip", UNDONE, None, of=self._votes[name])
        self._history.pop()  # not before it is written
        self._at = min(self._at, self._items.index(item))
        return True

    def _is_decided(self, item: Item) -> bool:
        """What a person wrote anew does not come again: there is nothing left to choose."""
        if item.name in self._votes or not item.again:
            return item.name in self._votes
        first = self._votes.get(replace(item, order=item.order[::-1]).name)
        return first is not None and first.edited is not None

    def _write(
        self, item: Item, verdict: str, raw: str, edited: str | None, of: Verdict | None = None
    ) -> None:
        """of: the vote that is taken back; one of an older version names no texts."""
        texts = of.texts if of else self._found.get(item.id).texts(item.a, item.b)
        made = Verdict(
            item.id, item.a, item.b, item.order, verdict, PERSON, raw=raw, time=self._clock(),
            edited=edited, texts=texts,
        )  # fmt: skip
        self._writer.append(made.as_dict())
        if raw == UNDONE:
            self._votes.pop(item.name, None)
        else:
            self._votes[item.name] = made

    def _read(self, path: Path) -> None:
        """Votes of earlier sittings, in their order, those that were taken back left out."""
        for number, _, line in lines.read_lines(path):
            where = f"{path.name}:{number}"
            v = parse_verdict(lines.decode(line, where), where)
            name = f"{v.id}:{v.a}:{v.b}:{v.order}"
            if v.judge != PERSON or name not in self._by_name or not self._found.get(v.id).has(v):
                continue
            if name in self._votes:
                self._history.remove(name)
                del self._votes[name]
            if v.raw != UNDONE:
                self._votes[name] = v
                self._history.append(name)

    def _state(self) -> dict[str, Any]:
        same, twice = self_agreement(self._votes.values())
        left = sum(not self._is_decided(item) for item in self._items)
        seconds = self._seconds_each()
        return {
            "voted": len(self._votes), "total": len(self._votes) + left,
            "can_undo": bool(self._history), "same": same, "twice": twice,
            "seconds_each": seconds, "seconds_left": None if seconds is None else seconds * left,
        }  # fmt: skip

    def _seconds_each(self) -> float | None:
        times = self._times[-PACE - 1 :]
        gaps = [b - a for a, b in zip(times, times[1:], strict=False) if b - a < PAUSE]
        return sum(gaps) / len(gaps) if gaps else None


def _nothing(candidates: Path, nothing_cut: bool) -> str:
    if nothing_cut:
        return f"{candidates}: no prompt has two different answers to compare."
    return (
        f"{candidates}: no prompt has two different answers that were not cut at --max-tokens, and "
        "`pairs build` leaves cut ones out. Answer with a larger one (`pairs generate`, to a new "
        "--output), or give --keep-cut, there too."
    )


def queue(found: CandidateFile, per_prompt: int, seed: int, keep_cut: bool = False) -> list[Item]:
    """Which comparisons are shown, which side is which, and what comes again, all by the seed.

    keep_cut: also those of answers that ended by length, of which `pairs build` makes no pair.
    """
    items: list[Item] = []
    repeats: list[tuple[int, Item]] = []
    for one in found:
        human = next((n for n, c in enumerate(one.candidates) if c.model == HUMAN), None)
        pairs = comparisons(
            one, neighbours=False, human=human, against_reference=False, cut=keep_cut
        )
        pairs.sort(key=lambda pair: _chance(seed, one.id, *pair, "which"))
        for a, b in pairs[:per_prompt]:
            chance = _chance(seed, one.id, a, b, "side")
            order = "ab" if chance % 2 else "ba"
            items.append(Item(one.id, a, b, order))
            if chance // 2 % AGAIN == 0:
                repeats.append((len(items) + LATER, Item(one.id, a, b, order[::-1], again=True)))
    for at, item in reversed(repeats):
        items.insert(at, item)
    return items


def _in_editor(text: str) -> str:
    """As a page's text field holds it: it has one kind of line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _chance(*parts: object) -> int:
    data = ":".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def votes_in(path: Path) -> list[Verdict]:
    """A person's votes that count."""
    return [v for v in read_verdicts(path).values() if v.judge == PERSON]
