"""What preference pairs teach, read from the reference's pooled features alone.

After What's In My Human Feedback (Movva et al. 2025, arXiv 2510.26202): the difference of the
features of both responses, chosen - rejected, is put into a logistic regression of the preference;
length is held beside every feature, and the rate of false discoveries is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fpo_mlx.intervals import wilson, witnesses
from fpo_mlx.judge.feature_report import Context, effect_size
from fpo_mlx.judge.logistic import (
    Fitted,
    SparseRows,
    choose,
    false_discovery,
    fit,
    folds_of,
    harmonic,
    held_out_logits,
    score_test,
    sigmoid,
    two_sided,
)
from fpo_mlx.records import PairScore, TokenPair

LEAST_SEEN = 10  # pairs in which a feature differs, below which it is not tested
LEAST_PAIRS = 20
OWN = 40  # features, at most, that the search for those with a part of their own goes through


@dataclass(frozen=True)
class PairFeatures:
    """The pooled features of N pairs under the reference, SAE after SAE, and their lengths."""

    chosen: SparseRows  # [N, F]
    rejected: SparseRows
    sizes: tuple[int, ...]  # F of each SAE
    lengths: np.ndarray  # tokens, int64 [N, 2] (chosen, rejected)
    words: SparseRows  # log(1 + count) of every token id, chosen - rejected
    groups: tuple[bytes, ...]  # the prompt of each pair

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def difference(self) -> SparseRows:
        return self.chosen.minus(self.rejected)

    @property
    def length_columns(self) -> np.ndarray:
        """What is held beside a feature: the difference in tokens and in their logarithm, [N, 2].

        Both, since one feature may go with long answers and another with twice as long ones.
        """
        tokens = self.lengths.astype(np.float64)
        logs = np.log(tokens)
        return np.stack([tokens[:, 0] - tokens[:, 1], logs[:, 0] - logs[:, 1]], axis=1)

    def name(self, column: int) -> tuple[int, int]:
        """(SAE, feature) of a column."""
        starts = np.cumsum([0, *self.sizes])
        sae = int(np.searchsorted(starts, column, side="right")) - 1
        return sae, int(column - starts[sae])

    def column(self, sae: int, feature: int) -> int:
        """The inverse of `name`."""
        return sum(self.sizes[:sae]) + feature


def pair_features(
    pairs: Sequence[TokenPair], refs: Sequence[PairScore], sizes: Sequence[int]
) -> PairFeatures:
    """refs: the reference's scores of the pairs; sizes: features of each SAE, in their order."""
    starts = np.cumsum([0, *sizes])
    sides: tuple[list, list] = ([], [])
    for ref in refs:
        for into, score in zip(sides, ref, strict=True):
            parts = score.features
            columns = [f.indices.astype(np.int64) + s for f, s in zip(parts, starts, strict=False)]
            into.append((np.concatenate(columns), np.concatenate([f.values for f in parts])))
    width = 1 + max(int(max(map(np.max, pair.responses))) for pair in pairs)
    counted = [
        SparseRows.of([_counts(pair.responses[side]) for pair in pairs], width) for side in (0, 1)
    ]
    return PairFeatures(
        SparseRows.of(sides[0], int(starts[-1])),
        SparseRows.of(sides[1], int(starts[-1])),
        tuple(sizes),
        np.array([[len(r) for r in pair.responses] for pair in pairs]),
        counted[0].minus(counted[1]),
        tuple(pair.prompt.tobytes() for pair in pairs),
    )


def _counts(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids, counts = np.unique(tokens, return_counts=True)
    return ids, np.log1p(counts)


@dataclass(frozen=True)
class Predictor:
    """How well one kind of evidence tells chosen from rejected, on pairs that it did not see."""

    name: str
    accuracy: float
    ci95: tuple[float, float]  # Wilson's
    log_loss: float  # nats per pair; ln 2 is chance
    explained: float  # 1 - log_loss / ln 2: McFadden's R^2, held out; below 0 is worse than chance


@dataclass(frozen=True)
class Example:
    """One pair for or against what a feature teaches; activations are means over a response."""

    where: str
    chosen: float
    rejected: float
    text: str  # the beginning of the response in which the feature is the stronger
    side: str


@dataclass(frozen=True)
class Lesson:
    """One feature that the pairs reward (z > 0) or punish, beside length."""

    sae: int
    feature: int
    z: float  # score test beside length
    q: float  # smallest rate of false discoveries at which it is one (Benjamini-Yekutieli)
    alone_z: float  # the same test without length beside it
    effect_size: float  # paired Cohen's d of chosen - rejected
    win_rate: float  # of the pairs in which it differs, those whose chosen has more of it
    differs: int  # pairs in which it differs
    explained: float  # share of the preference's log loss that it takes away, beside length
    own: bool  # it tells something that no stronger feature tells
    follows: tuple[int, int] | None  # (SAE, feature) that it goes with, where it has no own part
    correlation: float  # of its difference with that one's; 0 for an own one
    label: str = ""
    link: str = ""
    words: tuple[str, ...] = ()  # tokens of the responses in which it is strong
    examples: tuple[Example, ...] = ()
    against: tuple[Example, ...] = ()
    contexts: Sequence[Context] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Lessons:
    """found: features below the rate, the largest |z| first; probability: of each pair's label."""

    pairs: int
    tested: int
    rate: float
    length_z: float
    longer_chosen: float  # of the pairs of unequal length
    predictors: tuple[Predictor, ...]
    found: tuple[Lesson, ...]
    probability: np.ndarray  # that chosen is preferred, by features, held out [N]
    fitted: Fitted  # on all pairs


def learn(x: PairFeatures, *, rate: float = 0.05, folds: int = 5) -> Lessons:
    """What the pairs reward. rate: of false discoveries, over all features that are tested.

    Raises: ValueError for fewer than LEAST_PAIRS pairs or than `folds` prompts.
    """
    if len(x) < LEAST_PAIRS or len(set(x.groups)) < folds:
        raise ValueError(
            f"{len(x)} pairs of {len(set(x.groups))} prompts; wanted {LEAST_PAIRS} pairs or more, "
            f"of {folds} prompts or more"
        )
    difference = x.difference
    found, tested = discover(x, difference, rate)
    logits, predictors = _predictors(x, difference, folds)
    tokens = x.length_columns[:, :1]
    length_z = score_test(SparseRows.of_dense(tokens), np.zeros((len(x), 0)), x.groups)
    fitted = fit(difference, choose(difference, folds_of(x.groups, folds)))
    return Lessons(
        len(x), tested, rate, float(length_z[0]), _share(tokens[:, 0]), predictors, found,
        sigmoid(logits), fitted,
    )  # fmt: skip


def discover(
    x: PairFeatures, difference: SparseRows, rate: float
) -> tuple[tuple[Lesson, ...], int]:
    """The features that tell chosen from rejected beside length, and how many were tested."""
    length = x.length_columns
    tested = np.flatnonzero(difference.seen() >= LEAST_SEEN)
    z, plain = score_test(difference, length, x.groups), score_test(difference, length)
    alone = score_test(difference, np.zeros((len(x), 0)), x.groups)
    q = np.ones(difference.width)
    q[tested] = false_discovery(two_sided(z[tested]))
    below = tested[q[tested] <= rate]
    below = below[np.argsort(-np.abs(z[below]), kind="stable")]
    own = _own(x, difference, below, len(tested), rate)
    found = (
        _lesson(
            x, difference, int(i), float(z[i]), float(q[i]), float(alone[i]), float(plain[i]), own
        )
        for i in below
    )
    return tuple(found), len(tested)


def _own(
    x: PairFeatures, difference: SparseRows, below: np.ndarray, tested: int, rate: float
) -> list[int]:
    """Of the features found, those that tell something beside the stronger ones, step by step.

    below: strongest first; that one has nobody stronger. The others pass the bar of all that were
    tested, since they were picked among them.
    """
    found = difference.only(below)
    own = [0] if len(below) else []  # places in `below`
    while len(own) < min(OWN, len(below)):
        given = np.concatenate([x.length_columns, found.dense(np.array(own))], axis=1)
        z = np.abs(score_test(found, given, x.groups))
        z[own] = 0
        best = int(np.argmax(z))
        if two_sided(z[best : best + 1])[0] * tested * harmonic(tested) > rate:
            break
        own.append(best)
    return [int(below[at]) for at in own]


def _lesson(
    x: PairFeatures, difference: SparseRows, i: int, z: float, q: float, alone: float,
    plain: float, own: list[int],
) -> Lesson:  # fmt: skip
    """plain: z by the model's own variance, which the part of the log loss follows from."""
    moved = difference.dense(np.array([i]))[:, 0]
    follows, correlation = None, 0.0
    if i not in own and own:
        others = difference.dense(np.array(own))
        size = np.sqrt((others**2).sum(axis=0) * (moved**2).sum())
        cosines = np.divide(moved @ others, size, out=np.zeros(len(own)), where=size > 0)
        at = int(np.argmax(np.abs(cosines)))
        follows, correlation = x.name(own[at]), float(cosines[at])
    return Lesson(
        *x.name(i),
        z,
        q,
        alone,
        effect_size(moved),
        _share(moved),
        int((moved != 0).sum()),
        plain * plain / (2 * len(x) * math.log(2)),
        i in own,
        follows,
        correlation,
    )


def _share(moved: np.ndarray) -> float:
    """Of the values that are not 0, the share above it."""
    moved = moved[moved != 0]
    return float((moved > 0).mean()) if len(moved) else 0.5


def _predictors(
    x: PairFeatures, difference: SparseRows, folds: int
) -> tuple[np.ndarray, tuple[Predictor, ...]]:
    """The features' held-out logits, and how features do beside what fools nobody."""
    length = SparseRows.of_dense(x.length_columns)
    kinds = {
        "length": length,
        "bag of words": x.words,
        "features": difference,
        "features and length": difference.beside(length),
    }
    logits = {name: held_out_logits(rows, x.groups, folds) for name, rows in kinds.items()}
    every = (_predictor(name, one, x.groups) for name, one in logits.items())
    return logits["features"], tuple(every)


def _predictor(name: str, logits: np.ndarray, groups: Sequence[bytes]) -> Predictor:
    hits = np.where(logits > 0, 1.0, np.where(logits == 0, 0.5, 0.0))
    right, loss = float(hits.mean()), float(np.logaddexp(0.0, -logits).mean())
    interval = wilson(right, witnesses(hits.tolist(), groups))
    return Predictor(name, right, interval, loss, 1 - loss / math.log(2))


@dataclass(frozen=True)
class Presence:
    """Which token ids stand in which of M responses; made once, asked for every feature."""

    ids: np.ndarray  # of each response those that stand in it, one response after the other
    owner: np.ndarray  # the response of each, of equal shape
    seen: np.ndarray  # responses that have each id, [V]
    responses: int  # M

    @staticmethod
    def of(responses: Sequence[np.ndarray]) -> Presence:
        """responses: M arrays of token ids."""
        present = [np.unique(tokens) for tokens in responses]
        owner = np.repeat(np.arange(len(present)), [len(ids) for ids in present])
        ids = np.concatenate(present)
        return Presence(ids, owner, np.bincount(ids).astype(np.float64), len(present))

    def words(self, activations: np.ndarray, count: int, least: int = 5) -> list[int]:
        """Ids whose presence in a response goes best with a feature's mean activation there.

        activations: [M]; least: responses in which an id must stand.
        """
        seen, m = self.seen, self.responses
        centred = activations - activations.mean()
        joint = np.bincount(self.ids, weights=centred[self.owner], minlength=len(seen))
        spread = np.sqrt(np.maximum(seen * (1 - seen / m), 0.0))
        usable = (seen >= least) & (spread > 0)
        score = np.divide(joint, spread, out=np.full(len(seen), -np.inf), where=usable)
        best = np.argsort(-score, kind="stable")[:count]
        return [int(i) for i in best if score[i] > 0]


def examples_of(moved: np.ndarray, sign: float, count: int) -> tuple[list[int], list[int]]:
    """Pairs whose difference goes most with a sign, and most against it; none at 0. moved: [N]."""
    own = moved * math.copysign(1.0, sign)
    order = np.argsort(-own, kind="stable")
    for_it = [int(i) for i in order[:count] if own[i] > 0]
    return for_it, [int(i) for i in order[::-1][:count] if own[i] < 0]
