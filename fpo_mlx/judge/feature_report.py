"""Which SAE features moved between reference and policy, and which tell two text sets apart.

Pure numpy on pooled activations; the model's side is `feature_scan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fpo_mlx.judge import Sort
from fpo_mlx.judge.scaling import Scaled

CANDIDATES = 100  # features that the first step of `find` keeps


@dataclass(frozen=True)
class Context:
    """One token on which a feature fires, in its text; the token stands between « and »."""

    activation: float
    token: str
    text: str
    where: str  # "pair 7, rejected", "positive 3"


@dataclass(frozen=True)
class Change:
    """One feature before (reference) and after (policy). Activations are means over a response."""

    sae: int
    feature: int
    chosen_before: float
    chosen_after: float
    rejected_before: float
    rejected_after: float
    change: float  # after - before, mean over all responses
    effect_size: float  # paired Cohen's d: mean of the change / its standard deviation
    share_of_d: float  # of the sum of D over all responses (Eq. 10)
    label: str = ""
    link: str = ""
    contexts: Sequence[Context] = field(default=())
    scaling: Scaled | None = None  # where it was asked for

    def as_dict(self) -> dict[str, Any]:
        tokens = list(dict.fromkeys(context.token for context in self.contexts))
        return asdict(self) | {"tokens": tokens}


def effect_sizes(total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    """Paired Cohen's d by the sums of n differences and of their squares, each [F].

    0 where nothing moved, at most a million.
    """
    mean = total / n
    spread = np.sqrt(np.maximum(squares - n * mean**2, 0.0) / max(n - 1, 1))
    # below this the spread is what rounding leaves of equal changes
    spread = np.maximum(spread, 1e-6 * np.abs(mean))
    return np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 1e-12)


def effect_size(differences: np.ndarray) -> float:
    """The same of one feature's differences [n]."""
    own = differences.astype(np.float64)[:, None]
    return float(effect_sizes(own.sum(axis=0), (own**2).sum(axis=0), len(own))[0])


class Tally:
    """Sums over responses, so that a split of any length needs O(F) memory."""

    def __init__(
        self, n_features: int, k: int, *, magnitude: bool, weights: Mapping[int, float]
    ) -> None:
        """k: top-k of Eq. 10; magnitude: activations can be negative; weights: w_i of features."""
        self.k, self.magnitude = k, magnitude
        self.weights = np.ones(n_features)
        self.named = np.array(sorted(weights), dtype=np.int64)
        self.weights[self.named] = [weights[i] for i in self.named.tolist()]
        self.responses = 0
        self.before, self.after = np.zeros((2, n_features)), np.zeros((2, n_features))
        self.moved, self.squares = np.zeros(n_features), np.zeros(n_features)
        self.distance = np.zeros(n_features)  # sum of each feature's part of D

    def add(self, policy: np.ndarray, ref: np.ndarray) -> np.ndarray:
        """One pair. policy, ref: [2, F] (0 chosen, 1 rejected). Returns: D of both [2]."""
        policy, ref = policy.astype(np.float64), ref.astype(np.float64)
        moved = policy - ref
        self.before += ref
        self.after += policy
        self.moved += moved.sum(axis=0)
        self.squares += (moved**2).sum(axis=0)
        self.responses += 2
        parts = np.zeros_like(moved)
        for side in (0, 1):
            chosen = np.union1d(self.top(policy[side]), self.top(ref[side]))
            chosen = np.union1d(chosen, self.named).astype(np.int64)
            parts[side, chosen] = self.weights[chosen] * moved[side, chosen] ** 2 / self.k
        self.distance += parts.sum(axis=0)
        return parts.sum(axis=1)

    def top(self, pooled: np.ndarray) -> np.ndarray:
        """The k largest of [F], without those that are silent."""
        size = np.abs(pooled) if self.magnitude else pooled
        k = min(self.k, len(size))
        indices = np.argpartition(-size, k - 1)[:k]
        return indices[pooled[indices] != 0]

    def effect_sizes(self) -> np.ndarray:
        """Of every feature [F]."""
        return effect_sizes(self.moved, self.squares, self.responses)

    def changes(self, count: int, sort: Sort = "share_of_d", sae: int = 0) -> list[Change]:
        """The features that moved most, by magnitude; those that did not move are left out."""
        pairs, total = self.responses / 2, self.distance.sum()
        share = self.distance / total if total else self.distance
        effect, change = self.effect_sizes(), self.moved / self.responses
        key = {"share_of_d": share, "effect_size": effect, "change": change}[sort]
        order = [i for i in np.argsort(-np.abs(key), kind="stable")[:count] if self.squares[i]]
        before, after = self.before / pairs, self.after / pairs
        return [
            Change(
                sae, int(i), float(before[0, i]), float(after[0, i]), float(before[1, i]),
                float(after[1, i]), float(change[i]), float(effect[i]), float(share[i]),
            )
            for i in order
        ]  # fmt: skip


@dataclass(frozen=True)
class TextActivations:
    """What one SAE says of N texts; both [N, F] float32."""

    strongest: np.ndarray  # largest activation on a single token of the text
    mean: np.ndarray  # mean over the text's positions

    def some(self, texts: np.ndarray) -> TextActivations:
        return TextActivations(self.strongest[texts], self.mean[texts])


@dataclass(frozen=True)
class Found:
    """A feature that fires on the positive texts and not, or less, on the negative ones."""

    feature: int
    auc: float  # of the mean activation, on the texts that it was chosen from
    held_out_auc: float | None
    positive: float  # mean over the set of the mean activation
    negative: float
    positive_token: float  # mean over the set of the strongest single-token activation
    negative_token: float
    sae: int = 0
    label: str = ""
    link: str = ""
    contexts: Sequence[Context] = field(default=())


def find(
    positive: TextActivations,
    negative: TextActivations,
    count: int,
    *,
    held_out: float = 0.2,
    candidates: int = CANDIDATES,
) -> list[Found]:
    """Features that tell two sets of texts apart, the best first. At most `count`.

    Two steps, after FPO (Yin et al. 2025, arXiv 2411.07618), section 5.3. First, single tokens: the
    `candidates` features whose strongest activation on one token is, averaged over texts, the most
    larger on the positive set. Then, the mean over the set: of these, by how well a text's mean
    activation tells the sets apart (area under the ROC curve; then the difference of the means).
    Features that fire no more on the positive set are never found.

    held_out: share of either set that is left out of the choice, and judged on.
    """
    (chosen_p, held_p), (chosen_n, held_n) = (_parts(s, held_out) for s in (positive, negative))
    gap = chosen_p.strongest.mean(axis=0) - chosen_n.strongest.mean(axis=0)  # [F]
    first = np.argsort(-gap, kind="stable")[:candidates]
    means_p, means_n = chosen_p.mean.mean(axis=0), chosen_n.mean.mean(axis=0)
    first = [i for i in first.tolist() if gap[i] > 0 and means_p[i] > means_n[i]]
    scores = {i: auc(chosen_p.mean[:, i], chosen_n.mean[:, i]) for i in first}
    best = sorted(first, key=lambda i: (-scores[i], -(means_p[i] - means_n[i])))[:count]
    return [
        Found(
            i,
            scores[i],
            auc(held_p.mean[:, i], held_n.mean[:, i]) if held_p and held_n else None,
            float(means_p[i]),
            float(means_n[i]),
            float(chosen_p.strongest[:, i].mean()),
            float(chosen_n.strongest[:, i].mean()),
        )
        for i in best
    ]


def _parts(
    texts: TextActivations, held_out: float
) -> tuple[TextActivations, TextActivations | None]:
    """Held-out texts lie evenly among the others, so that both parts are from the whole file."""
    due = np.floor(np.arange(len(texts.mean) + 1) * held_out + 1e-9)
    held = np.diff(due) > 0
    return texts.some(~held), texts.some(held) if held.any() else None


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive value is the larger one; ties count one half. [N], [M]."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).mean() / (2 * len(negative)))
