"""Weights & Biases and TensorBoard, if asked for. Only figures and settings are sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fpo_mlx.errors import ConfigError

Track = Callable[[Any], None]


def open_trackers(names: str | None, project: str | None, config: Any) -> Track:
    """A function that takes the trainer's reports.

    Raises: ConfigError for an unknown tracker, or one whose package is not installed.
    """
    kinds = {"wandb": _wandb, "tensorboard": _tensorboard}
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in kinds]
    if unknown:
        raise ConfigError(f"--report-to {', '.join(unknown)}: wanted {' or '.join(kinds)}.")
    sinks = [kinds[name](project or "fpo-mlx", config) for name in wanted]

    def track(report: Any) -> None:
        if not hasattr(report, "loss"):
            return
        kind = "valid" if hasattr(report, "best") else "train"
        values = {f"{kind}/loss": report.loss}
        values |= {f"{kind}/{name}": value for name, value in report.metrics.items()}
        for sink in sinks:
            sink(values, report.iteration)

    return track


def _wandb(project: str, config: Any) -> Callable[[dict[str, float], int], None]:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError('--report-to wandb: run `pip install "fpo-mlx[wandb]"`.') from error
    run = wandb.init(project=project, config=config.as_dict())
    return lambda values, step: run.log(values, step=step)


def _tensorboard(project: str, config: Any) -> Callable[[dict[str, float], int], None]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            '--report-to tensorboard: run `pip install "fpo-mlx[tensorboard]"`.'
        ) from error
    writer = SummaryWriter(f"{config.train.adapter_path}/tensorboard/{project}")

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log
