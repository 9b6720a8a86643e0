"""From labelled candidates to pairs: the widest gap of each prompt, doubles out, lengths even."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import multimode
from typing import Any

from fpo_mlx.data.rows import Turns
from fpo_mlx.pairs.augment import score_turns
from fpo_mlx.pairs.labels import Label
from fpo_mlx.pairs.records import HUMAN, Candidates
from fpo_mlx.pairs.settings import BuildConfig

CUT = "an answer cut by length"


@dataclass(frozen=True)
class Pair:
    """One pair and where it came from. gap: difference of the scores it was chosen by.

    person: a person decided it, whatever the scores say, which are other judges'.
    """

    id: str
    prompt: Turns
    tools: tuple[dict[str, Any], ...] | None
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float
    agreement: float
    tokens: tuple[int, int]
    source: dict[str, Any]
    person: bool = False

    @property
    def gap(self) -> float:
        return self.score_chosen - self.score_rejected

    def row(self) -> dict[str, Any]:
        """As `train` reads it. Messages, so that no text can be taken for a transcript."""
        chosen, rejected = (
            [{"role": "assistant", "content": text}] for text in (self.chosen, self.rejected)
        )
        row: dict[str, Any] = {"prompt": [dict(turn) for turn in self.prompt]}
        row |= {"chosen": chosen, "rejected": rejected}
        row |= {"tools": list(self.tools)} if self.tools else {}
        row |= {"score_chosen": self.score_chosen, "score_rejected": self.score_rejected}
        return row | {"agreement": self.agreement, "id": self.id, "from": self.source}


@dataclass
class Left:
    """What became of candidates that make no pair, by reason."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def out(self, reason: str, n: int = 1) -> None:
        if n:
            self.counts[reason] += n


def pairs_of(
    found: Candidates, labels: Sequence[Label], settings: BuildConfig, left: Left
) -> list[Pair]:
    """The pairs of one prompt: a person's before all others, then by the widest gap.

    Scores are those of the judges; where they gave none, an answer's share of wins, a tie half.
    """
    scores = _scores(labels)
    pairs: list[Pair] = []
    for label in labels:
        with_human = HUMAN in (found.candidates[n].model for n in (label.a, label.b))
        if label.edited is not None:
            pairs += _edited(found, label, scores)
        elif with_human != settings.against_reference:
            left.out("a person's answer" if with_human else "no person's answer")
        elif label.verdict not in ("a", "b"):
            left.out("tie" if label.verdict == "tie" else "both bad")
        else:
            pairs.append(_pair(found, label, scores))
    kept = [pair for pair in pairs if _fits(pair, found, settings, left)]
    kept.sort(key=lambda pair: (not pair.person, -pair.gap, -pair.agreement))
    most = settings.per_prompt or (None if settings.margin is not None else 1)
    chosen = kept[:most]
    left.out("more pairs than asked for per prompt", len(kept) - len(chosen))
    return chosen


def _fits(pair: Pair, found: Candidates, settings: BuildConfig, left: Left) -> bool:
    numbers = [n for side in ("chosen", "rejected") if (n := pair.source[side]) is not None]
    own = pair.source["chosen"] is None and not settings.reward_augmented
    whole = settings.keep_cut or own  # a person's text has an end; turned, the cut one is chosen
    if not whole and any(found.candidates[n].cut for n in numbers):
        left.out(CUT)
    elif not pair.chosen.strip() or not pair.rejected.strip():
        left.out("an empty answer")
    elif pair.chosen.strip() == pair.rejected.strip():
        left.out("equal answers")
    elif settings.margin is not None and not (pair.person or pair.gap >= settings.margin):
        left.out("below --margin")
    else:
        return True
    return False


def _scores(labels: Sequence[Label]) -> dict[int, float]:
    given: dict[int, list[float]] = defaultdict(list)
    won: dict[int, list[float]] = defaultdict(list)
    for label in labels:
        share = {"a": label.agreement, "b": 1 - label.agreement}.get(label.verdict, 0.5)
        won[label.a].append(share)
        won[label.b].append(1 - share)
        for n, score in ((label.a, label.score_a), (label.b, label.score_b)):
            if score is not None:
                given[n].append(score)
    means = {n: sum(shares) / len(shares) for n, shares in won.items()}
    scored = {n: sum(found) / len(found) for n, found in given.items()}
    return scored if len(scored) == len(means) else means


def _pair(found: Candidates, label: Label, scores: dict[int, float]) -> Pair:
    best, worst = (label.a, label.b) if label.verdict == "a" else (label.b, label.a)
    chosen, rejected = found.candidates[best], found.candidates[worst]
    return Pair(
        found.id, found.prompt.turns, found.prompt.tools, chosen.text, rejected.text,
        scores[best], scores[worst], label.agreement, (chosen.tokens, rejected.tokens),
        {"chosen": best, "rejected": worst, "models": [chosen.model, rejected.model]},
        label.person,
    )  # fmt: skip


def _edited(found: Candidates, label: Label, scores: dict[int, float]) -> Iterator[Pair]:
    """A person's own text against both answers that it was made of."""
    text = str(label.edited)
    for n in (label.a, label.b):
        rejected = found.candidates[n]
        length = round(rejected.tokens * len(text) / max(1, len(rejected.text)))
        yield Pair(
            found.id, found.prompt.turns, found.prompt.tools, text, rejected.text, 1.0,
            min(scores[n], 0.5), 1.0, (length, rejected.tokens),
            {"chosen": None, "rejected": n, "models": [HUMAN, rejected.model]}, label.person,
        )  # fmt: skip


def augmented(pair: Pair) -> Iterator[Pair]:
    """Both rows of a scored pair (arXiv 2410.08067, section 3): the wanted score decides who wins.

    Their scores say how far each answer is from what is asked for (the paper squares it), so that
    the chosen one's is the higher in both; the true scores stand beside the wanted one.
    """
    own, other = pair.score_chosen, pair.score_rejected
    missed = -abs(own - other)
    source = {**pair.source, "chosen": pair.source["rejected"], "rejected": pair.source["chosen"]}
    source["models"] = pair.source["models"][::-1]
    turned = replace(
        pair, chosen=pair.rejected, rejected=pair.chosen, tokens=pair.tokens[::-1], source=source,
    )  # fmt: skip
    for one, scores in ((pair, [own, other]), (turned, [other, own])):
        told = one.source | {"wanted": scores[0], "scores": scores}
        prompt = score_turns(pair.prompt, scores[0])
        yield replace(one, prompt=prompt, score_chosen=0.0, score_rejected=missed, source=told)


def asks_alike(pair: Pair) -> bool:
    """Whether both rows would ask for the same score and want opposite answers for it."""
    one, other = (score_turns(pair.prompt, s) for s in (pair.score_chosen, pair.score_rejected))
    return one == other


def balanced(pairs: Sequence[Pair], seed: int, left: Left) -> list[Pair]:
    """As many pairs whose longer answer wins as others; some of the more frequent kind go."""
    kinds = {True: [], False: []}
    for n, pair in enumerate(pairs):
        if pair.tokens[0] != pair.tokens[1]:
            kinds[pair.tokens[0] > pair.tokens[1]].append(n)
    more = max(kinds.values(), key=len)
    surplus = abs(len(kinds[True]) - len(kinds[False]))
    gone = set(random.Random(seed).sample(more, surplus))
    left.out("to even the lengths", len(gone))
    return [pair for n, pair in enumerate(pairs) if n not in gone]


def longer_share(pairs: Iterable[Pair]) -> float | None:
    """Of pairs whose answers differ in length: the longer one is chosen."""
    apart = [p.tokens[0] > p.tokens[1] for p in pairs if p.tokens[0] != p.tokens[1]]
    return sum(apart) / len(apart) if apart else None


def split_of(
    ids: Iterable[str], answered: Iterable[str], valid: float, test: float, seed: int
) -> dict[str, str]:
    """A split for each prompt of `ids`, by its place by hash among all that were answered.

    So it stays in one whichever others make pairs, or a later round would be validated on what an
    earlier one trained on. Whoever is asked for gets one prompt at least where two are.
    """
    unique = set(ids)
    order = sorted(
        unique.union(answered), key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).digest()
    )
    valid_end, test_end = (round(share * len(order)) for share in (valid, valid + test))
    splits = {
        id: "valid" if place < valid_end else "test" if place < test_end else "train"
        for place, id in enumerate(order)
        if id in unique
    }
    if splits:
        splits[list(splits)[-1]] = "train"
    for name, share in (("valid", valid), ("test", test)):
        if share and splits and name not in splits.values():
            largest = multimode(splits.values())[0]
            first, *more = (id for id, split in splits.items() if split == largest)
            splits |= {first: name} if more else {}
    return splits
