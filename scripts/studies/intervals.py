"""The studies' intervals of 95 %, of [seeds, prompts]: seeds and prompts are crossed, all see all.

Two stand beside each other: the bootstrap over both is too narrow where three runs differ much,
Student's t over the seeds where they happen not to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
Mean = Callable[..., Any]  # of values; of one axis of them, where axis is given


def drawn(ours: np.ndarray, theirs: np.ndarray, mean: Mean = np.mean) -> list[float]:
    """Of mean(ours) - mean(theirs), both [seeds, prompts]; both axes are drawn anew, together."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, len(ours), (RESAMPLES, len(ours)))
    prompts = rng.integers(0, ours.shape[1], (RESAMPLES, ours.shape[1]))
    gaps = [
        mean(ours[s][:, p]) - mean(theirs[s][:, p]) for s, p in zip(seeds, prompts, strict=True)
    ]
    return np.percentile(gaps, [2.5, 97.5]).tolist()


def of_seeds(each: Sequence[float] | np.ndarray) -> list[float] | None:
    """Student's t, of the mean of one figure per seed; None of one seed."""
    from scipy.stats import t

    n = len(each)
    if n < 2:
        return None
    off = float(t.ppf(0.975, n - 1) * np.std(each, ddof=1) / np.sqrt(n))
    return [float(np.mean(each)) - off, float(np.mean(each)) + off]


def gap(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Mean difference of [seeds, prompts], its 95 % in both ways, and each seed's.

    drawn: over prompts alone where there is one seed. t: over the seeds, where there are more.
    """
    each = (ours - theirs).mean(axis=1)
    found = {"mean": float(each.mean()), "drawn": drawn(ours, theirs)}
    by_t = of_seeds(each)
    return found | ({"t": by_t} if by_t else {}) | {"of_seeds": each.tolist()}
