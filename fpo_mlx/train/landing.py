"""The end of a run with a target: the part of the adapters' change that has it is what is saved.

The controller steers by the pairs of a few updates, so a run ends some fifteen percent from its
target. Validation pairs say where it ended; drifts and KLs grow smoothly with the part of a change
that is taken, so a few more looks at them find the part that has what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import TrainConfig
from fpo_mlx.model import adapters
from fpo_mlx.records import FEWEST
from fpo_mlx.train.drift import named_as
from fpo_mlx.train.events import LandedReport
from fpo_mlx.train.metrics import means_of

NEAR = 0.03  # of the figure, in logarithms: relative D within 3 %, features within 1.5 %
LEAST, MOST = 0.1, 1.25  # parts; further up lies what was never trained
LOOKS = 3
POWER = 2.0  # of the part, that relative D and KL grow with where changes are small

Values = Mapping[str, np.ndarray]  # per pair, as `metrics.measure` gives them


@dataclass(frozen=True)
class Landed:
    """A part of the adapters' change, its weights, and what the pairs measure with it."""

    part: float
    weights: Mapping[str, mx.array]
    values: Values

    def report(
        self, iteration: int, figure: str, target: float, whole: Values, seconds: float
    ) -> LandedReport:
        """whole: the values of the whole change; figure and target: as the controller has them."""
        before, after = (float(values[figure].mean()) for values in (whole, self.values))
        means = means_of(self.values)
        return LandedReport(
            iteration, figure.removesuffix("/rejected"), named_as(figure, target),
            named_as(figure, before), self.part, named_as(figure, after), means.pop("loss"), means,
            len(self.values["loss"]), seconds,
        )  # fmt: skip


def hindrance(config: TrainConfig, pairs: int) -> str | None:
    """Why a run cannot be landed on so many validation pairs; None where it can."""
    if config.init_adapter:
        return "the change from another adapter (--init-adapter) has no parts"
    if pairs < FEWEST:
        more = "more rows in valid, or more --val-batches"
        return f"{pairs} validation pairs, {FEWEST} are needed: {more}"
    return None


def land(
    model: nn.Module,
    reference: Mapping[str, mx.array],
    measure: Callable[[float], Values | None],
    whole: Values,
    *,
    figure: str,
    target: float,
) -> Landed | None:
    """The part of the model's change from `reference` whose mean `figure` is near the target.

    measure: part -> the values of the model as it stands, None where it must not stay so; whole:
    those of the whole change. The model is left as it was. None: see `meeting`.
    """
    adapted, seen = dict(adapters.parameters(model)), {}

    def look(part: float) -> float:
        adapters.update(model, adapters.part_of(reference, adapted, part))
        values = measure(part)
        if values is None:
            return math.nan
        seen[part] = values
        return float(values[figure].mean())

    try:
        part = meeting(look, float(whole[figure].mean()), target)
    finally:
        adapters.update(model, adapted)
    if part is None:
        return None
    return Landed(part, adapters.part_of(reference, adapted, part), seen[part])


def meeting(look: Callable[[float], float], whole: float, target: float) -> float | None:
    """The part of a change whose figure is `target`; None: there is no need, or nothing nearer.

    look: part -> figure, called LOOKS times at most; whole: the figure of part 1. The nearest of
    what was looked at is taken.
    """
    if not _is_figure(whole) or _off(whole, target) <= NEAR:
        return None
    seen = {1.0: whole}
    for _ in range(LOOKS):
        part = _following(seen, target)
        if part in seen:
            break
        figure = look(part)
        if not _is_figure(figure):
            break
        seen[part] = figure
        if _off(figure, target) <= NEAR:
            break
    part = min(seen, key=lambda part: _off(seen[part], target))
    return None if part == 1.0 else part


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
