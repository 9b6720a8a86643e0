"""How sure a share of n is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pvariance

NORMAL95 = 1.959964  # standard deviations to either side that hold 95 % of a normal
SHARES = (0.05, 0.1, 0.2)  # of pairs to hold back, as they are advised
ENOUGH = 50  # pairs: of them an accuracy is known to about 14 points


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n: of five in five it does not say that all would be.

    Source: Wilson 1927, "Probable inference".
    """
    z2 = NORMAL95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_to_hold(pairs: float | None) -> float:
    """The smallest of `SHARES` that holds enough back; of few pairs the largest. None: unknown."""
    if pairs is None:
        return SHARES[0]
    return next((share for share in SHARES if share * pairs >= ENOUGH), SHARES[-1])


def of_groups(shares: Sequence[float], most: int) -> tuple[float, float]:
    """`wilson` of the mean of groups' shares, each of up to `most` answers that may be alike."""
    return wilson(fmean(shares), len(shares) * answers_a_group(shares, most))


def answers_a_group(shares: Sequence[float], most: float) -> float:
    """How many answers a group counts for: as many as the groups' shares vary like.

    One where all of a group's go the same way, `most` where each goes its own. A group that is won
    and one that is lost are put beside them for that, as a few that agree by chance say little.
    """
    beside = [*shares, 0.0, 1.0]
    mean = fmean(beside)
    alike = mean * (1 - mean) / pvariance(beside)
    return min(max(alike, 1.0), most)
