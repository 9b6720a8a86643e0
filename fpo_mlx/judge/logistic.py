"""Logistic regression on the differences of pairs, in numpy: fits, score tests, false discoveries.

Every row x is chosen - rejected, so the model has no constant and every row's answer is "yes":
P(chosen is preferred) = sigmoid(x @ w), the model of Bradley and Terry (1952).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 60  # of Newton; a fit needs ten or so
SCREENED = (8, 32, 256)  # columns that a fit looks at, those that alone tell the most
PENALTIES = (0.01, 0.1, 1.0)  # per row
Choice = tuple[int, float]  # of both, by cross-validation


@dataclass(frozen=True)
class SparseRows:
    """N rows of F numbers without their zeros, one row after the other."""

    offsets: np.ndarray  # int64 [N + 1]
    columns: np.ndarray  # int64 [nnz]
    values: np.ndarray  # float64 [nnz]
    width: int  # F

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def of(rows: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> SparseRows:
        """From (columns, values) of each row; a column that stands twice in a row is summed."""
        sizes = [len(columns) for columns, _ in rows]
        columns = np.concatenate([c for c, _ in rows]) if rows else np.zeros(0)
        values = np.concatenate([v for _, v in rows]) if rows else np.zeros(0)
        owner = np.repeat(np.arange(len(rows)), sizes)
        return _summed(owner, columns.astype(np.int64), values.astype(np.float64), len(rows), width)

    @staticmethod
    def of_dense(dense: np.ndarray) -> SparseRows:
        """From [N, F]."""
        rows, columns = np.nonzero(dense)
        return _summed(rows, columns, dense[rows, columns].astype(np.float64), *dense.shape)

    @property
    def owner(self) -> np.ndarray:
        """The row of every number, int64 [nnz]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def minus(self, other: SparseRows) -> SparseRows:
        """Row by row; both have the same shape."""
        return _summed(
            np.concatenate([self.owner, other.owner]),
            np.concatenate([self.columns, other.columns]),
            np.concatenate([self.values, -other.values]),
            len(self),
            self.width,
        )

    def beside(self, other: SparseRows) -> SparseRows:
        """The columns of both, those of `other` behind."""
        return _summed(
            np.concatenate([self.owner, other.owner]),
            np.concatenate([self.columns, other.columns + self.width]),
            np.concatenate([self.values, other.values]),
            len(self),
            self.width + other.width,
        )

    def take(self, rows: np.ndarray) -> SparseRows:
        sizes = np.diff(self.offsets)[rows]
        starts = np.repeat(self.offsets[:-1][rows] - (np.cumsum(sizes) - sizes), sizes)
        picks = starts + np.arange(int(sizes.sum()))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return SparseRows(offsets, self.columns[picks], self.values[picks], self.width)

    def only(self, columns: np.ndarray) -> SparseRows:
        """These columns, in this order."""
        place = np.full(self.width, -1)
        place[columns] = np.arange(len(columns))
        at = place[self.columns]
        kept = at >= 0
        return _summed(self.owner[kept], at[kept], self.values[kept], len(self), len(columns))

    def dense(self, columns: np.ndarray) -> np.ndarray:
        """These columns, [N, K] float64."""
        place = np.full(self.width, -1)
        place[columns] = np.arange(len(columns))
        at = place[self.columns]
        out = np.zeros((len(self), len(columns)))
        out[self.owner[at >= 0], at[at >= 0]] = self.values[at >= 0]
        return out

    def sums(
        self, rows: np.ndarray, of: Callable[[np.ndarray], np.ndarray] = lambda v: v
    ) -> np.ndarray:
        """Of every column: sum over rows of rows[i] * of(x[i]); rows: [N]. Returns: [F]."""
        weights = of(self.values) * rows[self.owner]
        sums = np.bincount(self.columns, weights=weights, minlength=self.width)
        return sums.astype(np.float64)  # without any number bincount gives integers

    def seen(self) -> np.ndarray:
        """In how many rows each column is not zero, [F]."""
        return np.bincount(self.columns, minlength=self.width)


def _summed(
    owner: np.ndarray, columns: np.ndarray, values: np.ndarray, n: int, width: int
) -> SparseRows:
    """In order, doubles added up, and what they cancel left out."""
    names, place = np.unique(owner * width + columns, return_inverse=True)
    sums = np.bincount(place, weights=values, minlength=len(names))
    names, sums = names[sums != 0], sums[sums != 0]
    offsets = np.searchsorted(names, np.arange(n + 1) * width)
    return SparseRows(offsets, names % width, sums, width)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))


def ridge(x: np.ndarray, penalty: float) -> np.ndarray:
    """w [K] at the least of sum log(1 + exp(-x @ w)) + penalty / 2 |w|^2. x: [N, K].

    Newton's method; a step that would climb is halved. penalty is above 0, so there is one answer.
    """
    w = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -(x @ w)).sum() + penalty / 2 * (w @ w))

    here = loss(w)
    for _ in range(STEPS):
        p = sigmoid(x @ w)
        slope = penalty * w - x.T @ (1 - p)
        curve = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(w))
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (there := loss(w - size * step)) > here and size > 1e-6:
            size /= 2
        w = w - size * step
        if here - there < 1e-10 * max(1.0, here):
            break
        here = there
    return w


def score_test(
    x: SparseRows, given: np.ndarray, groups: Sequence[bytes] | None = None
) -> np.ndarray:
    """Whether a column tells anything beside the columns `given` [N, c]: z of each, [F].

    Rao's score test of the column's weight being 0: no fit per column is needed. z has the sign of
    the weight that it would get, and is 0 where a column does not vary beside the given ones.
    groups: rows of one group (of one prompt) are no independent witnesses: where the variance of
    the groups' scores is the larger one, it is taken (Liang and Zeger 1986).
    """
    given = given / np.maximum(np.sqrt((given**2).mean(axis=0)), 1e-300)
    p = sigmoid(given @ ridge(given, 1e-3))
    info = p * (1 - p)
    slope, spread = x.sums(1 - p), x.sums(info, np.square)
    weights = np.zeros((x.width, 0))
    if given.shape[1]:
        shared = np.stack([x.sums(info * column) for column in given.T], axis=1)  # [F, c]
        inner = (given * info[:, None]).T @ given + 1e-9 * np.eye(given.shape[1])
        weights = np.linalg.solve(inner, shared.T).T  # of the given columns in each one, [F, c]
        rest = spread - (shared * weights).sum(axis=1)
        spread = np.where(rest > 1e-9 * spread, rest, 0.0)
    if groups is not None and len(set(groups)) < len(groups):
        of_groups = _group_variance(x, given, 1 - p, weights, groups)
        spread = np.where(spread > 0, np.maximum(spread, of_groups), 0.0)
    return np.divide(slope, np.sqrt(spread), out=np.zeros_like(slope), where=spread > 0)


def _group_variance(
    x: SparseRows, given: np.ndarray, residual: np.ndarray, weights: np.ndarray,
    groups: Sequence[bytes],
) -> np.ndarray:  # fmt: skip
    """Of every column: the sum over groups of (sum over its rows of the score) squared, [F].

    The score of a row is residual * (x - given @ weights).
    """
    number = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    of = np.array([number[group] for group in groups])
    summed = _summed(of[x.owner], x.columns, x.values * residual[x.owner], len(number), x.width)
    added = np.zeros((len(number), given.shape[1]))
    np.add.at(added, of, given * residual[:, None])  # [G, c]
    cross = np.zeros_like(weights)
    for at, column in enumerate(added.T):
        cross[:, at] = summed.sums(column)
    own = summed.sums(np.ones(len(number)), np.square)
    explained = ((weights @ (added.T @ added)) * weights).sum(axis=1)
    return own - 2 * (weights * cross).sum(axis=1) + explained


def two_sided(z: np.ndarray) -> np.ndarray:
    """p of z under the normal distribution, either side."""
    return np.array([math.erfc(abs(one) / math.sqrt(2)) for one in z.tolist()])


def false_discovery(p: np.ndarray) -> np.ndarray:
    """The smallest rate of false discoveries at which each test is a discovery, [m].

    Benjamini and Yekutieli 2001: right however the tests depend on each other, as features do.
    """
    m = len(p)
    if not m:
        return p
    order = np.argsort(p, kind="stable")
    scaled = p[order] * m * harmonic(m) / np.arange(1, m + 1)
    out = np.empty(m)
    out[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return out


def harmonic(m: int) -> float:
    return float((1 / np.arange(1, m + 1)).sum())


@dataclass(frozen=True)
class Fitted:
    """A regression on some columns; weights are per unit of a column, in log-odds."""

    columns: np.ndarray  # int64 [K]
    weights: np.ndarray  # float64 [K]
    scale: np.ndarray  # root mean square of each column over the rows of the fit, [K]
    penalty: float  # per row

    def logits(self, x: SparseRows) -> np.ndarray:
        """[N]"""
        return x.dense(self.columns) @ self.weights


def screen(x: SparseRows) -> np.ndarray:
    """The columns that vary, those that alone tell the most first."""
    z = np.abs(score_test(x, np.zeros((len(x), 0))))
    best = np.argsort(-z, kind="stable")[: max(SCREENED)]
    return best[z[best] > 0]


def fit(x: SparseRows, choice: Choice) -> Fitted:
    """Ridge regression on the first columns of `screen`, each at root mean square 1."""
    count, penalty = choice
    columns = screen(x)[:count]
    dense, scale = _scaled(x, columns)
    return Fitted(columns, ridge(dense, penalty * len(x)) / scale, scale, penalty)


def _scaled(x: SparseRows, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    dense = x.dense(columns)
    scale = np.sqrt((dense**2).mean(axis=0))
    return dense / scale, scale


def folds_of(groups: Sequence[bytes], count: int, seed: int = 0) -> np.ndarray:
    """The fold of each row; rows of one group (a prompt) are never in two. [N]"""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    number = {names[i]: at % count for at, i in enumerate(order)}
    return np.array([number[group] for group in groups])


def choose(x: SparseRows, folds: np.ndarray) -> Choice:
    """How many columns and which penalty, by the least held-out log loss over these folds."""
    losses = dict.fromkeys([(count, penalty) for count in SCREENED for penalty in PENALTIES], 0.0)
    for fold in np.unique(folds):
        inside, held = x.take(np.flatnonzero(folds != fold)), x.take(np.flatnonzero(folds == fold))
        columns = screen(inside)
        dense, scale = _scaled(inside, columns)
        outside = held.dense(columns) / scale
        for count, penalty in losses:
            w = ridge(dense[:, :count], penalty * len(inside))
            loss = np.logaddexp(0.0, -(outside[:, :count] @ w)).sum()
            losses[count, penalty] += float(loss)
    return min(losses, key=lambda choice: losses[choice])


def held_out_logits(x: SparseRows, groups: Sequence[bytes], count: int = 5) -> np.ndarray:
    """The logit of every row by a fit that saw neither it nor its prompt, [N].

    How each fit is made is chosen by three folds of its own rows.
    """
    folds, out = folds_of(groups, count), np.zeros(len(x))
    for fold in range(count):
        held, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(held):
            continue
        own = x.take(rest)
        inner = folds_of([groups[i] for i in rest.tolist()], 3, seed=1)
        out[held] = fit(own, choose(own, inner)).logits(x.take(held))
    return out
