"""The adapter folder: what mlx-lm loads, and beside it what an exact resume needs.

adapters.safetensors, adapter_config.json   as mlx_lm.load(adapter_path=...) takes them
0000100_adapters.safetensors                numbered checkpoints
best/                                       the adapter with the lowest validation loss
run.json                                    all settings, versions, fingerprints
metrics.jsonl                               one line per report or validation
train.lock                                  held while a run writes
checkpoint/state.safetensors                adapters, optimizer, reference adapter, random state
                                            (with position and best-so-far in its metadata, so
                                            that one rename moves them all)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from fpo_mlx.config import named
from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.model import adapters, randomness
from fpo_mlx.model.trees import arrays_of, read_arrays
from fpo_mlx.storage import files, locks

STATE = Path("checkpoint") / "state.safetensors"
LOCK = "train.lock"  # held while a run writes


@dataclass
class Progress:
    """Where a run stands, at an update boundary."""

    iteration: int = 0  # done
    pairs: int = 0  # trained on
    tokens: int = 0
    best_loss: float | None = None
    best_iteration: int = 0
    stale: int = 0  # validations since the best
    skipped: int = 0  # updates left out
    skipped_in_a_row: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl
    drift: dict[str, float] = field(default_factory=dict)  # the controller's state
    window: dict[str, Any] = field(default_factory=dict)  # sums since the last report


@dataclass(frozen=True)
class AdapterFolder:
    """Writes one run's files; every one whole or not at all.

    writes: False for all but the first of several processes, which then leave no trace.
    """

    path: Path
    adapter_config: Mapping[str, Any]
    writes: bool = True

    def save_adapters(self, model: nn.Module, iteration: int | None = None) -> None:
        """The current adapters; numbered as well when an iteration is given."""
        if not self.writes:
            return
        weights = dict(adapters.parameters(model))
        if iteration is not None:
            adapters.save(self.path / f"{iteration:07d}_adapters.safetensors", weights)
        self._save_pair(self.path, weights)

    def save_best(self, model: nn.Module) -> None:
        if not self.writes:
            return
        self._save_pair(self.path / "best", dict(adapters.parameters(model)))

    def _save_pair(self, folder: Path, weights: Mapping[str, mx.array]) -> None:
        """Weights and their configuration, never one of them with an older run's other."""
        config, text = folder / adapters.CONFIG, files.json_text(dict(self.adapter_config))
        if not config.is_file() or config.read_bytes() != text.encode():
            (folder / adapters.WEIGHTS).unlink(missing_ok=True)  # of another shape or scale
            files.write_text(config, text)
        adapters.save(folder / adapters.WEIGHTS, weights)

    def save_state(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        reference: Mapping[str, mx.array],
        good: Mapping[str, mx.array],
        progress: Progress,
    ) -> None:
        """Everything that the next update depends on, in one file.

        good: the adapters that a run falls back on when its next update diverges.
        """
        if not self.writes:
            return
        arrays = {f"adapter.{k}": v for k, v in adapters.parameters(model)}
        arrays |= {f"optimizer.{k}": v for k, v in arrays_of(optimizer.state)}
        arrays |= {f"reference.{k}": v for k, v in reference.items()}
        arrays |= {f"good.{k}": v for k, v in good.items()}
        arrays["random"] = cast("list[mx.array]", mx.random.state)[0]
        metadata = {"progress": json.dumps(asdict(progress))}
        path = self.path / STATE
        with files.atomic_path(path) as temporary:
            mx.save_safetensors(str(temporary), arrays, metadata=metadata)

    def load_state(
        self, model: nn.Module, optimizer: Optimizer, path: Path | None = None
    ) -> tuple[Progress, dict[str, mx.array], dict[str, mx.array]]:
        """Put a saved state back. Returns: progress, the reference's adapters and the good ones.

        path: where the state lies, if not in this folder.
        Raises: ModelError when the file is damaged or belongs to another adapter.
        """
        path = path or self.path / STATE
        try:
            arrays, metadata = read_arrays(path)
            progress = Progress(**json.loads(metadata["progress"]))
            high, low = cast("list[int]", arrays["random"].tolist())
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}). Start the run anew without --resume; its "
                f"numbered adapters in {self.path} are still good."
            ) from error

        def part(name: str) -> dict[str, mx.array]:
            return {k[len(name) + 1 :]: v for k, v in arrays.items() if k.startswith(name + ".")}

        own, saved = dict(adapters.parameters(model)), part("adapter")
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
            raise ModelError(f"{path} holds other adapters than this run's; check --num-layers.")
        adapters.update(model, saved)
        optimizer.state = tree_unflatten(list(part("optimizer").items()))
        randomness.go_to((high << 32) | low)
        return progress, part("reference"), part("good")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for one run. Raises FpoError naming the run that has it already."""
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locks.held(self.path / LOCK, self.path):
                for folder in (self.path, self.path / "best", self.path / STATE.parent):
                    files.sweep(folder)
                yield
        except OSError as error:
            raise files.unwritable(self.path, error) or error from error

    def start(self, run: Mapping[str, Any]) -> None:
        """Begin a new run here; an older run's metrics and checkpoints do not survive it."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / STATE).unlink(missing_ok=True)  # first: half a folder must not be resumed
        for old in (*self.path.glob("*_adapters.safetensors"), self.path / "metrics.jsonl"):
            old.unlink(missing_ok=True)
        for folder in ("checkpoint", "best"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        files.write_json(self.path / "run.json", dict(run))

    def note(self, parts: Mapping[str, Any]) -> None:
        """Add parts to run.json; what it says of the start stays, also when the run was resumed."""
        path = self.path / "run.json"
        if self.writes:
            files.write_json(path, {**files.parse_json(path.read_text(encoding="utf-8")), **parts})

    def log(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        line, path = json.dumps(entry) + "\n", self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(line)
        except OSError as error:
            raise files.unwritable(path, error) or error from error
        progress.metrics_bytes += len(line.encode())

    def rewind_log(self, progress: Progress) -> None:
        """Drop the lines that were written after the state was saved."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        if path.exists():
            os.truncate(path, min(progress.metrics_bytes, path.stat().st_size))


def check_resumable(folder: Path, run: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the settings that would change the trajectory."""
    path = folder / "run.json"
    if not (folder / STATE).is_file() or not path.is_file():
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint. Start without --resume, or give the "
            "--adapter-path of the run to continue."
        )
    try:
        before = files.parse_json(path.read_text(encoding="utf-8"))
        if not all(isinstance(before[part], dict) for part in ("settings", "fingerprints")):
            raise TypeError("settings or fingerprints are no objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error!r}). Start anew without --resume.") from error
    may_change = named("may_change")
    faults = [
        f"  {section}.{name}: was {old!r}, now {now!r}"
        for section in ("settings", "fingerprints")
        for name in sorted(set(before[section]) | set(run[section]))
        if name not in may_change
        and (old := before[section].get(name)) != (now := _plain(run[section].get(name)))
    ]
    if faults:
        raise ConfigError(
            f"--resume: these settings would make another run of {folder}:\n"
            + "\n".join(faults)
            + "\nUse the old values, or start anew in another --adapter-path."
        )


def _plain(value: Any) -> Any:
    """As JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(value))
