"""The frontier of an adapter: what it costs and gains at each part of its change.

One training gives a whole line of models, base + s (change). Pure functions of figures that were
measured at some s; the measuring is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

CLOSE = 0.01  # of the scale found: how much larger one is known to be too large
SMALLEST = 0.5**10  # part that is tried; of less the figures are rounding


def scale_at(scales: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The s at which a figure that grows with s reaches `target`, between those that were measured.

    scales, values: equally long, one figure per scale; between two of them the figure is taken as a
    power of s, which KL and D are near 0. None where the target lies outside of what was measured.
    """
    points = sorted((s, v) for s, v in zip(scales, values, strict=True) if s > 0 and v > 0)
    for (s0, v0), (s1, v1) in zip(points, points[1:], strict=False):
        if v0 <= target <= v1 and v0 < v1:
            part = math.log(target / v0) / math.log(v1 / v0)
            return math.exp(math.log(s0) + part * math.log(s1 / s0))
    return None


def largest_scale(measure: Callable[[float], float], bound: float) -> tuple[float, float]:
    """The largest s in [0, 1] at which a figure that grows with s stays within `bound`.

    measure: s -> figure, called at 1 first, then by bisection. Returns: (s, the figure there), s to
    within CLOSE of itself; 1 where the whole adapter stays within the bound, 0 where SMALLEST does
    not. That is 18 calls at most.
    """
    whole = measure(1.0)
    if whole <= bound:
        return 1.0, whole
    low, high, found = 0.0, 1.0, 0.0
    while high - low > CLOSE * low and high > SMALLEST:
        middle = (low + high) / 2
        value = measure(middle)
        if value <= bound:
            low, found = middle, value
        else:
            high = middle
    return low, found
