"""Drift as a setting: alpha is found while training, so that the policy drifts as far as asked.

Raw alpha means another thing for every SAE, rate and model; what a user can name is how far the
policy may go: `--target-drift r`, features move by r of their own size (the root of the mean
relative D of the rejected responses), or `--target-kl`, nats per rejected response.

A controller in logarithms: with e = ln(measured / wanted), measured a running mean over updates,

    ln A <- ln A + I clip(e, -1, 1)        alpha = A exp(clip(e, -S_below, S_above))

The first line is the integral part: it settles where measured = wanted, whatever the SAE's scale.
The second answers at once, before the adapters have gone further. Below the target A falls only
when the drift has stopped growing (the running mean is not above a slower one): else A would wind
down during the whole way up, and the drift would shoot past.

An optimizer that normalises its gradient (Adam) moves the features by its very steps, however large
alpha is; a target below that is met by shorter steps alone. So alpha ends where the constraint at
the target weighs PULL nats, more than all that a pair can gain, and A beyond it shortens the steps:

    alpha = min(A, PULL / target) exp(clip(e, …))        step = min(1, PULL / (target A))

All figures are float64 and the same in every process, so a resumed run goes on to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fpo_mlx.config import Objective

DECAY, SLOW = 0.9, 0.95  # of the running mean and of the slower one, per update
GROWING = 1.15  # running mean over slower mean, above which the drift is still on its way
INTEGRAL = 0.07  # I, per update
S_BELOW, S_ABOVE = 3.0, math.log(5.0)  # alpha is at least a twentieth and at most five times A
FIRST = {"drift": 30.0, "kl": 0.5}  # A before the first update, where PULL allows it
PULL = 1.0  # nats that the constraint weighs at the target, at most; a pair begins at ln 2
SHORTEST = 0.01  # part of the optimizer's step that is taken at least


@dataclass(frozen=True)
class Mean:
    """A running mean without the bias of its start."""

    decay: float
    total: float = 0.0
    weight: float = 0.0  # of what it has seen, 1 at last

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def after(self, value: float) -> Mean:
        keep, take = self.decay, 1 - self.decay
        return Mean(keep, keep * self.total + take * value, keep * self.weight + take)


@dataclass(frozen=True)
class Controller:
    """The state of a run's controller; `after` gives the next one."""

    target: float  # of the measured figure: relative D, or nats per response
    level: float  # A
    fast: Mean = Mean(DECAY)
    slow: Mean = Mean(SLOW)

    @staticmethod
    def for_drift(r: float) -> Controller:
        """Relative D is a square: features that move by r of their size have r^2."""
        return Controller(r * r, min(FIRST["drift"], PULL / (r * r)))

    @staticmethod
    def for_kl(nats: float) -> Controller:
        return Controller(nats, min(FIRST["kl"], PULL / nats))

    @staticmethod
    def of(objective: Objective) -> Controller | None:
        """The controller that an objective asks for, None where its alpha is given."""
        if objective.target_drift is not None:
            return Controller.for_drift(objective.target_drift)
        if objective.target_kl is not None:
            return Controller.for_kl(objective.target_kl)
        return None

    @staticmethod
    def figure(objective: Objective) -> str:
        """The metric that the controller of this objective reads."""
        return "kl/rejected" if objective.constraint == "kl" else "drift/rejected"

    @property
    def error(self) -> float:
        """e, 0 while nothing has moved: there is nothing to hold yet."""
        return math.log(self.fast.value / self.target) if self.fast.value > 0 else 0.0

    @property
    def alpha(self) -> float:
        level = min(self.level, PULL / self.target)
        return level * math.exp(min(max(self.error, -S_BELOW), S_ABOVE))

    @property
    def step(self) -> float:
        """The part of the optimizer's step that is taken, 1 where alpha is enough."""
        return min(1.0, PULL / (self.target * self.level))

    def after(self, value: float) -> Controller:
        """The controller after an update on pairs whose rejected responses measured `value`."""
        seen = replace(self, fast=self.fast.after(value), slow=self.slow.after(value))
        growing = seen.fast.value > GROWING * seen.slow.value
        if seen.error < 0 and growing:
            return seen
        change = INTEGRAL * min(max(seen.error, -1.0), 1.0)
        highest = PULL / (self.target * SHORTEST)
        return replace(seen, level=min(seen.level * math.exp(change), highest))

    def saved(self) -> dict[str, float]:
        """As JSON holds it, to the bit."""
        return {
            "target": self.target, "level": self.level,
            "fast": self.fast.total, "fast_weight": self.fast.weight,
            "slow": self.slow.total, "slow_weight": self.slow.weight,
        }  # fmt: skip

    @staticmethod
    def loaded(saved: Mapping[str, float]) -> Controller:
        return Controller(
            saved["target"],
            saved["level"],
            Mean(DECAY, saved["fast"], saved["fast_weight"]),
            Mean(SLOW, saved["slow"], saved["slow_weight"]),
        )
