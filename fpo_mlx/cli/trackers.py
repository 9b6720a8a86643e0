"""Weights & Biases and TensorBoard, if asked for. Only figures and settings are sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol

from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError, pip_install
from fpo_mlx.train.events import LandedReport, Report, StepReport, ValidReport


class Sink(Protocol):
    """Where figures go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None:
        """Send what is still waiting."""
        ...


@contextmanager
def tracking(
    names: str | None, project: str | None, config: RunConfig
) -> Iterator[Callable[[Report], None]]:
    """A function that takes the trainer's reports, until the block ends, however it ends.

    Raises: ConfigError for an unknown tracker, or one whose package is not installed.
    """
    kinds = {"wandb": _Wandb, "tensorboard": _TensorBoard}
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in kinds]
    if unknown:
        raise ConfigError(f"--report-to {', '.join(unknown)}: wanted {' or '.join(kinds)}.")
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for name in wanted:
            sinks.append(kinds[name](project or "fpo-mlx", config))
            stack.callback(sinks[-1].close)

        def track(report: Report) -> None:
            if isinstance(report, StepReport | ValidReport | LandedReport):
                values = figures(report)
                for sink in sinks:
                    sink.log(values, report.iteration)

        yield track


def figures(report: StepReport | ValidReport | LandedReport) -> dict[str, float]:
    """A report's figures by the names that trackers show; finite ones only."""
    kind = {ValidReport: "valid", LandedReport: "landed"}.get(type(report), "train")
    values: dict[str, float | None] = {f"{kind}/loss": report.loss}
    values |= {f"{kind}/{name}": value for name, value in report.metrics.items()}
    if isinstance(report, LandedReport):
        values["landed/part"] = report.part
    if isinstance(report, StepReport):
        for name in (
            "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb", "skipped", "alpha",
            "part",
        ):  # fmt: skip
            values[f"train/{name}"] = getattr(report, name)
    return {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


class _Wandb:
    def __init__(self, project: str, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"--report-to wandb: run `{pip_install('wandb')}`.") from error
        self._run = wandb.init(project=project, config=config.as_dict())

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, project: str, config: RunConfig) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            how = pip_install("tensorboardX")
            raise ConfigError(f"--report-to tensorboard: run `{how}`.") from error
        self._folder = f"{config.train.adapter_path}/tensorboard/{project}"
        self._open, self._writer = SummaryWriter, None

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # its folder comes after the run has claimed the one around it
            self._writer = self._open(self._folder)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
