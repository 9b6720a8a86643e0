"""`fpo-mlx train`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import gather, preset_option, settings
from fpo_mlx.cli.show import Bar, Progress, result, say
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig, TrainConfig
from fpo_mlx.machine.processes import is_first


@click.command(cls=Command)
@preset_option
@settings(DataConfig, ReferenceConfig, Objective, TrainConfig)
def train(**values) -> None:
    """Train LoRA adapters on preference pairs.

    The reference is run first where its cache does not have all pairs.

    \b
    Example:
      fpo-mlx train --model mlx-community/gemma-2-2b-it-4bit --data pairs/ \\
        --sae gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55 \\
        --iters 300 --batch-size 2 --learning-rate 2e-5 --adapter-path adapters
    """
    from fpo_mlx import pipeline
    from fpo_mlx.cli import trackers
    from fpo_mlx.pipeline.train import claim_place

    config = gather(values)
    if is_first():
        claim_place(config)  # before a tracker begins
    trackers_of = config.train.report_to if is_first() else None  # of several processes
    show = Progress()
    with trackers.tracking(trackers_of, config.train.project_name, config) as track:
        reports = pipeline.train(
            config,
            say=show.say,
            progress=Bar("reference"),
            install_stop=on_signal,
            begin=show.begin,
        )
        trained = False
        try:
            for report in reports:
                trained = True
                show(report)
                track(report)
        finally:
            show.close()
    if is_first() and trained:
        for line in pipeline.verdict(Path(config.train.adapter_path)):
            say(line)
    result(f"adapters in {config.train.adapter_path}")


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_signal_within() -> Iterator[Callable[[], Callable[[], int | None]]]:
    """`on_signal` of one part of a command: behind it signals do what they did before."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield on_signal
    finally:
        for number, handler in before.items():
            if handler is not None:  # of one that C installed there is no telling
                signal.signal(number, handler)


def on_signal() -> Callable[[], int | None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run after the update in work.

    A second Ctrl-C ends it at once. Under nohup a closed terminal ends nothing.
    """
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        seen.append(128 + number)
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # the shell and the system each send one
            _amid("the terminal was closed: stopping after this update")
            return
        _amid("stopping after this update; press again to stop at once")
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return lambda: seen[0] if seen else None


def _amid(text: str) -> None:
    """Say it, unless the signal came while a line was written: a buffer takes no second writer."""
    with suppress(RuntimeError):
        say(text)
