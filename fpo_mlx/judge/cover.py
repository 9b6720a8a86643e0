"""Rows in the space of features: those that nearly double each other, and few that cover much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fpo_mlx.judge.logistic import SparseRows

PROJECTED = 256  # numbers that stand for a row while doubles are looked for
SLACK = 0.05  # what the projection may take from a cosine
BLOCK = 512  # rows that are compared with all others at once


def near_doubles(rows: SparseRows, least: float, seed: int = 0) -> list[tuple[int, int, float]]:
    """(i, j, cosine), i < j, of rows whose cosine is `least` or more, by (i, j).

    Random signs (Achlioptas 2003) bring every row to PROJECTED numbers; what is near there is
    measured exactly. A pair within SLACK's reach of `least` may, rarely, be missed.
    """
    norms = np.sqrt(_squares(rows))
    short = np.zeros((len(rows), PROJECTED), dtype=np.float32)
    signs, place = _signs(rows.columns, seed)
    for i in range(len(rows)):
        own = slice(rows.offsets[i], rows.offsets[i + 1])
        short[i] = rows.values[own].astype(np.float32) @ signs[place[own]]
    sizes = np.linalg.norm(short, axis=1, keepdims=True)
    short = np.divide(short, sizes, out=np.zeros_like(short), where=sizes > 0)
    found = []
    for start in range(0, len(rows), BLOCK):
        near = short[start : start + BLOCK] @ short.T
        for i, j in np.argwhere(near >= least - SLACK).tolist():
            if start + i < j:
                cosine = _dot(rows, start + i, j) / (norms[start + i] * norms[j])
                if cosine >= least:
                    found.append((start + i, j, float(cosine)))
    return found


def _signs(columns: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [used, PROJECTED] of -1 and 1, the row of each column): of 2M features few are used."""
    used, place = np.unique(columns, return_inverse=True)
    signs = np.random.default_rng(seed).integers(0, 2, (len(used), PROJECTED), dtype=np.int8)
    signs *= 2
    signs -= 1
    return signs, place


def _squares(rows: SparseRows) -> np.ndarray:
    return np.bincount(rows.owner, weights=rows.values**2, minlength=len(rows))


def _dot(rows: SparseRows, i: int, j: int) -> float:
    a, b = (slice(rows.offsets[n], rows.offsets[n + 1]) for n in (i, j))
    _, at, there = np.intersect1d(
        rows.columns[a], rows.columns[b], assume_unique=True, return_indices=True
    )
    return float(rows.values[a][at] @ rows.values[b][there])


def cover(sets: Sequence[np.ndarray], count: int) -> list[int]:
    """Rows chosen one by one, each the one with the most features not covered yet.

    After Diversity-driven data selection by SAEs (Yang et al. 2025, arXiv 2502.14050), greedy form.
    When nothing new is left, a new round begins among the rows that remain. Ties go to the first.
    sets: feature numbers of each row.
    """
    holders: dict[int, list[int]] = {}
    for row, features in enumerate(sets):
        for feature in np.unique(features).tolist():
            holders.setdefault(feature, []).append(row)
    taken, chosen = np.zeros(len(sets), dtype=bool), []
    gains = _gains(sets)
    covered: set[int] = set()
    while len(chosen) < min(count, len(sets)):
        best = int(np.argmax(np.where(taken, -1, gains)))
        if gains[best] <= 0 and covered:
            gains, covered = _gains(sets), set()
            continue
        chosen.append(best)
        taken[best] = True
        for feature in set(np.unique(sets[best]).tolist()) - covered:
            covered.add(feature)
            gains[holders[feature]] -= 1
    return chosen


def _gains(sets: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([len(np.unique(features)) for features in sets])


def strongest(rows: SparseRows, count: int) -> list[np.ndarray]:
    """The `count` largest columns of each row, by magnitude."""
    out = []
    for i in range(len(rows)):
        own = slice(rows.offsets[i], rows.offsets[i + 1])
        order = np.argsort(-np.abs(rows.values[own]), kind="stable")[:count]
        out.append(rows.columns[own][order])
    return out
