"""`fpo-mlx doctor --device-check`: what this device makes of every kernel, run and prediction."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx import __version__
from fpo_mlx.errors import FpoError
from fpo_mlx.machine import blas, device
from fpo_mlx.pipeline.device_check.lines import Line

KIND, VERSION = "fpo-mlx device check", 1
NO_GPU = "nothing of a GPU was checked: its branches ran on a CPU, at a small size"


@dataclass(frozen=True)
class Checked:
    """A device check's result."""

    machine: dict[str, Any]
    lines: tuple[Line, ...]
    size: str
    gpu: bool
    seconds: float

    @property
    def wrong(self) -> int:
        return sum(line.verdict == "WRONG" for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": KIND, "version": VERSION, "machine": self.machine, "size": self.size,
            "gpu": self.gpu, "seconds": round(self.seconds, 1), "wrong": self.wrong,
            "note": "" if self.gpu else NO_GPU,
            "findings": [line.as_dict() for line in self.lines],
        }  # fmt: skip


def check_device(*, small: bool = False, show: Callable[[Line], None] = lambda _: None) -> Checked:
    """Every part of the check, one after the other; each finding is shown as it comes.

    small: tiny shapes, seconds instead of minutes. A CPU takes these whatever is asked for, and so
    does a GPU without the memory for others. What is refused is a finding; other parts go on.
    """
    blas.preload()
    from fpo_mlx.pipeline.device_check import kernels, launches, places, runs, speed

    started, gpu = time.perf_counter(), device.here().gpu
    real = gpu and not small and device.memory() >= places.REAL_BYTES
    size = places.REAL if real else places.SMALL
    parts = (
        ("size", _of_the_size() if gpu and not small and not real else ()),
        ("kernels", kernels.lines(size)), ("kernels", runs.backbones(size)),
        ("start", runs.starts(size)), ("updates", runs.updates()),
        ("launches", launches.lines()), ("speed", speed.lines(size, gpu=real)),
    )  # fmt: skip
    found = []
    for name, part in parts:
        for line in _to_its_end(name, part):
            show(line)
            found.append(line)
    seconds = time.perf_counter() - started
    return Checked(facts(), tuple(found), size.name, gpu, seconds)


def _of_the_size() -> Iterator[Line]:
    from fpo_mlx.pipeline.device_check import places

    note = f"under {places.REAL_BYTES / 1e9:.0f} GB: small shapes, whose times say little"
    yield Line("size", "memory for MLX", device.memory() / 1e9, unit="GB", note=note)


def _to_its_end(name: str, part: Iterable[Line]) -> Iterator[Line]:
    """The lines of a part; where MLX or a run of it refuses something, that as the last one."""
    try:
        yield from part
    except (RuntimeError, ValueError, FpoError) as error:
        said = str(error).replace(str(Path.home()), "~")  # the file names no user
        yield Line(name, f"{name}, ended early", 1.0, 0.0, note=said)


def facts() -> dict[str, Any]:
    """Versions, the device and its memory; no path, and no name of a user or a host."""
    packages = ("mlx", "mlx-lm", "numpy")
    info = device.info()
    return {
        "fpo-mlx": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "system": _system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "backend": device.backend(),
        "device": str(info.get("device_name", "CPU")),
        "architecture": str(info.get("architecture", platform.machine())),
        "driver": _driver() if device.backend() == "cuda" else None,
        "memory_bytes": round(device.memory()),
        "largest_buffer_bytes": info.get("max_buffer_length"),
    }


def _system() -> str:
    if version := platform.mac_ver()[0]:
        return f"macOS {version}"
    return f"{platform.system()} {platform.release()}"


def _driver() -> str | None:
    """Of an NVIDIA card."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
