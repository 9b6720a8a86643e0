"""How sure a share of n is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean

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
    return wilson(fmean(shares), len(shares) * _told_by_one(shares, [1.0] * len(shares), most))


def witnesses(hits: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many independent rows these tell as much as: fewer where those of a group go together.

    hits: 0 to 1 of each row, groups: its group. The number that would give their mean the variance
    that it has by groups (Kish's design effect); all of them where groups go together no more than
    by chance.
    """
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, int] = {}
    for hit, group in zip(hits, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + hit
        sizes[group] = sizes.get(group, 0) + 1
    return len(hits) * _told_by_one([*sums.values()], [*sizes.values()], 1.0)


def _told_by_one(sums: Sequence[float], sizes: Sequence[float], most: float) -> float:
    """As how many independent rows one of these groups counts: `most` where each goes its own way.

    A group that is won and one that is lost, as large as the mean, are put beside them for that, as
    a few that agree by chance say little. Where all of a group's rows go together, the least is a
    row a group.
    """
    size = fmean(sizes)
    beside = [*zip(sums, sizes, strict=True), (0.0, size), (size, size)]
    count = math.fsum(own for _, own in beside)
    mean = math.fsum(won for won, _ in beside) / count
    spread = math.fsum((won - mean * own) ** 2 for won, own in beside)
    return min(max(count * mean * (1 - mean) / spread, 1 / max(sizes)), most)
