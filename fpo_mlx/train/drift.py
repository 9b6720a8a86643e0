"""Drift as a setting: alpha is found while training, so that the policy drifts as far as asked.

Raw alpha means another thing for every SAE, rate and model; what a user can name is how far the
policy may go: `--target-drift r`, features move by r of their own size (the root of the mean
relative D of the rejected responses), or `--target-kl`, nats per rejected response.

A controller in logarithms: with e = ln(measured / wanted), measured a running mean over updates,

    ln A <- ln A + I c + H max(c, 0)^2        c = clip(e, -1, 1)
    alpha = A exp(clip(e + T g, -S_below, S_above))

The first line is the integral part: it settles where measured = wanted, whatever the SAE's scale,
and hurries where the drift is far above that. The second answers at once, before the adapters have
gone further, and to where the drift is going: g is the logarithm of the running mean over a slower
one, its growth within some ten updates. The optimizer's momentum and the means are late by some
twenty, and without g the drift swings around its target. Below the target A falls only where the
drift does not grow by GROWING within those ten updates: else A would wind down during the whole way
up, and the drift would shoot past. A way up that is slower than that (hundreds of updates) is told
by g alone.

An optimizer that normalises its gradient (Adam) moves the features by its very steps, however large
alpha is; a target below that is met by shorter steps alone. So alpha ends where the constraint at
the target weighs PULL nats of the margin, more than the margin itself has, and A beyond that
shortens the steps, as long as the drift does not fall by itself; on its way back it hurries too:

    alpha = min(A, PULL / target) exp(clip(…))        part = PULL / (target A), 1 at most

All figures are float64 and the same in every process, so a resumed run goes on to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fpo_mlx.config import Objective

DECAY, SLOW = 0.9, 0.95  # of the running mean and of the slower one, per update
GROWING = 1.15  # running mean over slower mean, above which the drift is still on its way
FALLING = 1.01  # slower mean over running mean, above which it comes back by itself
RETURNING = 0.1  # part of the integral by which steps become shorter meanwhile
INTEGRAL = 0.03  # I, per update
TREND = 1.5  # T
HURRY = 0.04  # H
S_BELOW, S_ABOVE = 3.0, math.log(5.0)  # alpha is at least a twentieth and at most five times A
FIRST = {"drift": 30.0, "kl": 0.5}  # A before the first update, where PULL allows it
# nats of the margin that the constraint weighs at the target, at most; margins reach some .5 where
# they are per token, some 10 where they are sums over a response. With 1 per token a run began so
# weakly held that the guard stopped it (target .3)
PULL = {"token": 3.0, "response": 30.0}
SHORTEST = 0.1  # part of the optimizer's step that is taken at least
TELL = 0.7  # part below which the user is told


def named_as(figure: str, value: float) -> float:
    """A measured figure as its target is named: the drift r, not relative D, which is its square.

    figure: "drift/rejected", "kl/rejected".
    """
    return math.sqrt(value) if figure.startswith("drift") else value


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
    pull: float = PULL["token"]
    fast: Mean = Mean(DECAY)
    slow: Mean = Mean(SLOW)
    shortest: float = 1.0  # smallest part so far

    @staticmethod
    def begin(kind: str, target: float, pull: float = PULL["token"]) -> Controller:
        """kind: "drift" or "kl"; target: of the measured figure."""
        return Controller(target, min(FIRST[kind], pull / target), pull)

    @staticmethod
    def for_drift(r: float, pull: float = PULL["token"]) -> Controller:
        """Relative D is a square: features that move by r of their size have r^2."""
        return Controller.begin("drift", r * r, pull)

    @staticmethod
    def of(objective: Objective) -> Controller | None:
        """The controller that an objective asks for, None where its alpha is given."""
        pull = PULL["token" if objective.length_normalize else "response"]
        if objective.target_drift is not None:
            return Controller.for_drift(objective.target_drift, pull)
        if objective.target_kl is not None:
            return Controller.begin("kl", objective.target_kl, pull)
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
    def trend(self) -> float:
        """g, above 0 where the drift grows; 0 where a KL is rounding's size, of either sign."""
        fast, slow = self.fast.value, self.slow.value
        return math.log(fast / slow) if min(fast, slow) > 0 else 0.0

    @property
    def bound(self) -> float:
        """A at which the constraint weighs `pull` at the target; alpha rises no further with it."""
        return self.pull / self.target

    @property
    def alpha(self) -> float:
        swing = self.error + TREND * self.trend
        return min(self.level, self.bound) * math.exp(min(max(swing, -S_BELOW), S_ABOVE))

    def largest_pull(self, max_margin: float) -> float:
        """Nats of the margin that the constraint may weigh in one pair.

        Half of what the guard lets a margin per token have; of sums as much more as of the target.
        """
        return 0.5 * max_margin * self.pull / PULL["token"]

    @property
    def part(self) -> float:
        """How much of the optimizer's step is taken, 1 where alpha is enough."""
        return max(SHORTEST, min(1.0, self.bound / self.level))

    @property
    def told(self) -> bool:
        """Whether steps have been so short that the user was told."""
        return self.shortest < TELL

    def after(self, value: float) -> Controller:
        """The controller after an update on pairs whose rejected responses measured `value`."""
        seen = replace(self, fast=self.fast.after(value), slow=self.slow.after(value))
        if seen.error < 0 and seen.fast.value > GROWING * seen.slow.value:
            return seen
        e = min(max(seen.error, -1.0), 1.0)
        hurry = abs(e) if e > 0 or seen.level > seen.bound else 0.0  # to whole steps, too
        change = (INTEGRAL + HURRY * hurry) * e
        falling = seen.slow.value > FALLING * seen.fast.value
        if falling and seen.error > 0 and seen.level >= seen.bound:
            change *= RETURNING  # the way back needs its steps
        seen = replace(seen, level=min(seen.level * math.exp(change), seen.bound / SHORTEST))
        return replace(seen, shortest=min(seen.shortest, seen.part))

    def saved(self) -> dict[str, float]:
        """As JSON holds it, to the bit."""
        return {
            "target": self.target, "level": self.level, "shortest": self.shortest,
            "fast": self.fast.total, "fast_weight": self.fast.weight,
            "slow": self.slow.total, "slow_weight": self.slow.weight,
        }  # fmt: skip

    @staticmethod
    def loaded(saved: Mapping[str, float], objective: Objective) -> Controller:
        """Of a state in which alpha had no bound yet, it gets one."""
        begun = Controller.of(objective)
        assert begun is not None, "a state with a controller has settings with a target"
        return replace(
            begun,
            target=saved["target"],
            level=min(saved["level"], math.inf if "shortest" in saved else begun.bound),
            fast=Mean(DECAY, saved["fast"], saved["fast_weight"]),
            slow=Mean(SLOW, saved["slow"], saved["slow_weight"]),
            shortest=saved.get("shortest", 1.0),
        )
