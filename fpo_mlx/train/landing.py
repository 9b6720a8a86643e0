"""The end of a run with a target: the part of the adapters' change that meets it is what is saved.

The controller steers by the pairs of a few updates, so a run ends some fifteen percent from its
target. Validation pairs say where it ended; drifts and KLs grow smoothly with the part of a change
that is taken, so one or two more looks at them find the part that has what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

NEAR = 0.03  # of the figure, in logarithms: relative D within 3 %, features within 1.5 %
LEAST, MOST = 0.1, 1.25  # parts; further up lies what was never trained
LOOKS = 3
POWER = 2.0  # of the part, that relative D and KL grow with where changes are small
FEWEST = 16  # validation pairs; D scatters so much that fewer say less than the controller


def meeting(
    measure: Callable[[float], float], whole: float, target: float
) -> tuple[float, float] | None:
    """The part of a change whose figure is `target`, and the figure there; None: there is no need.

    measure: part -> figure, called LOOKS times at most; whole: the figure of part 1. The nearest of
    what was looked at is taken.
    """
    if not _is_figure(whole) or _off(whole, target) <= NEAR:
        return None
    seen = {1.0: whole}
    for _ in range(LOOKS):
        part = _following(seen, target)
        if part in seen:
            break
        figure = measure(part)
        if not _is_figure(figure):
            return None
        seen[part] = figure
        if _off(figure, target) <= NEAR:
            break
    part = min(seen, key=lambda part: _off(seen[part], target))
    return None if part == 1.0 else (part, seen[part])


def _following(seen: Mapping[float, float], target: float) -> float:
    """Where to look next: the figure is a power of the part, between the looks around the target,
    or through the two nearest where all lie on one side.
    """
    below = [part for part in seen if seen[part] < target]
    above = [part for part in seen if seen[part] > target]
    nearest = sorted(seen, key=lambda part: _off(seen[part], target))
    a, *others = (max(below), min(above)) if below and above else nearest[:2]
    power = POWER
    for b in others:
        power = max(math.log(seen[a] / seen[b]) / math.log(a / b), POWER / 4)
    part = a * (target / seen[a]) ** (1 / power)
    return min(max(part, LEAST), MOST)


def _off(figure: float, target: float) -> float:
    return abs(math.log(figure / target))


def _is_figure(value: float) -> bool:
    return math.isfinite(value) and value > 0
