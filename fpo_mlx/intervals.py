"""How sure a share of n is."""

from __future__ import annotations

import math

NORMAL95 = 1.959964  # standard deviations to either side that hold 95 % of a normal


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n: of five in five it does not say that all would be.

    Source: Wilson 1927, "Probable inference".
    """
    z2 = NORMAL95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)
