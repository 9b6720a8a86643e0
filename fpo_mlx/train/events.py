"""What a training run tells its caller, as light records: importing them loads no mlx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """Means over the pairs since the last report."""

    iteration: int
    loss: float
    metrics: Mapping[str, float]  # TRL's names: rewards/…, logps/…, features/…, kl/…
    learning_rate: float
    grad_norm: float | None  # of the last update that was made
    pairs: int  # trained on so far
    tokens_per_second: float  # distinct tokens: a prompt counts once a pair
    pairs_per_second: float
    peak_memory_gb: float
    skipped: int = 0  # updates left out so far
    alpha: float | None = None  # of the next update, where a controller finds it
    part: float | None = None  # of the optimizer's step that the next update takes, with alpha
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValidReport:
    iteration: int
    loss: float
    metrics: Mapping[str, float]
    pairs: int
    seconds: float
    best: bool  # lowest loss so far
    warnings: tuple[str, ...] = ()
    witnesses: float | None = None  # pairs of different prompts that tell as much of the accuracy


@dataclass(frozen=True)
class SavedReport:
    iteration: int
    numbered: bool


@dataclass(frozen=True)
class SkippedReport:
    """An update that the guard left out; iteration: where it would have stood."""

    iteration: int
    reason: str
    in_a_row: int


@dataclass(frozen=True)
class StoppedReport:
    """The run ended before its last iteration, because validation found nothing better."""

    iteration: int
    validations: int  # in a row without a better loss
    best_iteration: int
    best_loss: float


@dataclass(frozen=True)
class LandedReport:
    """At the end a part of the change was saved, for the target's sake (`train/landing.py`).

    figure: "drift", of features in parts of their size, or "kl", nats per response.
    """

    iteration: int
    figure: str
    target: float
    before: float  # of the whole change
    part: float  # of the change, that was saved
    after: float  # of that part
    loss: float  # of that part, as all that follows
    metrics: Mapping[str, float]
    pairs: int
    seconds: float
    witnesses: float | None = None  # as a validation's


Report = StepReport | ValidReport | SavedReport | SkippedReport | StoppedReport | LandedReport
