"""The adapter folder: what mlx-lm loads, and beside it what an exact resume needs.

adapters.safetensors, adapter_config.json   as mlx_lm.load(adapter_path=...) takes them; at the end
                                            of a run with a target the part that has it
0000100_adapters.safetensors                numbered checkpoints
best/                                       the adapter with the lowest validation loss
run.json                                    all settings, versions, fingerprints
metrics.jsonl                               one line per report or validation
chat_template.jinja                         that of --chat-template, for whoever uses the adapters
train.lock                                  held while a run writes
checkpoint/state.safetensors                adapters, optimizer, reference adapter, random state
                                            (with position and best-so-far in its metadata, so
                                            that one rename moves them all)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from fpo_mlx.config import Objective, TrainConfig, default_of, named, options
from fpo_mlx.errors import Interrupted, ModelError
from fpo_mlx.model import adapters, randomness
from fpo_mlx.model.trees import arrays_of, read_arrays
from fpo_mlx.storage import files, locks
from fpo_mlx.storage.adapter_files import EARLIER, TEMPLATE
from fpo_mlx.storage.runfolder import METRICS, RunFolder

STATE = Path("checkpoint") / "state.safetensors"
NUMBERED = "_adapters.safetensors"  # behind seven digits or more
LOCK = "train.lock"  # held while a run writes
# by what validations tell the best one; versions before did so by the loss that is trained
PREFERENCE, AS_TRAINED = "preference", "as trained"


@dataclass
class Progress:
    """Where a run stands, at an update boundary."""

    iteration: int = 0  # done
    pairs: int = 0  # trained on
    tokens: int = 0
    best_loss: float | None = None
    best_iteration: int = 0
    stale: int = 0  # validations since the best
    judged_by: str = PREFERENCE  # what best_loss is a loss of
    skipped: int = 0  # updates left out
    skipped_in_a_row: int = 0
    landed: bool = False  # the end was looked at: `train/landing.py`
    fell: bool = False  # `guard.fallen` was told
    metrics_bytes: int = 0  # length of metrics.jsonl
    drift: dict[str, float] = field(default_factory=dict)  # the controller's state
    window: dict[str, Any] = field(default_factory=dict)  # sums since the last report

    def once(self, fallen: str | None) -> tuple[str, ...]:
        """What `guard.fallen` says, the first time in the whole run."""
        said = () if fallen is None or self.fell else (fallen,)
        self.fell = self.fell or bool(said)
        return said

    def rejudged(self, o: Objective) -> tuple[str, ...]:
        """Forget a best that was judged by another rule; what to say of it."""
        before, self.judged_by = self.judged_by, PREFERENCE
        same = before == PREFERENCE or o.constraint == "none" or not o.judged_alpha
        if same or self.best_loss is None:
            return ()
        said = (
            f"the best so far (iteration {self.best_iteration}) was judged with the constraint's "
            "part of the loss, by an older version: the next validation is taken for the best"
        )
        self.best_loss, self.best_iteration, self.stale = None, 0, 0
        return (said,)


@dataclass(frozen=True)
class AdapterFolder:
    """Writes one run's files; every one whole or not at all."""

    path: Path
    adapter_config: Mapping[str, Any]

    @property
    def run(self) -> RunFolder:
        return run_folder(self.path)

    def save_adapters(self, model: nn.Module, iteration: int | None = None) -> None:
        """The current adapters; numbered as well when an iteration is given."""
        weights = dict(adapters.parameters(model))
        if iteration is not None:
            adapters.save(self.path / f"{iteration:07d}{NUMBERED}", weights)
        self._save_pair(self.path, weights)

    def save_part(self, weights: Mapping[str, mx.array]) -> None:
        """A part of the change, in the place of the whole; numbered file and checkpoint stay."""
        self._save_pair(self.path, weights)

    def save_best(self, model: nn.Module) -> None:
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
        arrays = {f"adapter.{k}": v for k, v in adapters.parameters(model)}
        arrays |= {f"optimizer.{k}": v for k, v in arrays_of(optimizer.state)}
        arrays |= {f"reference.{k}": v for k, v in reference.items()}
        arrays |= {f"good.{k}": v for k, v in good.items()}
        arrays["random"] = cast("list[mx.array]", mx.random.state)[0]
        metadata = {"progress": json.dumps(asdict(progress))}
        path = self.path / STATE
        with files.atomic_path(path) as temporary:
            mx.save_safetensors(str(temporary), arrays, metadata=metadata)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for one run. Raises FpoError naming the run that has it already."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locks.held(self.path / LOCK, self.path):
                for folder in (self.path, self.path / "best", self.path / STATE.parent):
                    files.sweep(folder)
                yield
        except files.Unwritable as error:
            raise self._going_on(error) from error
        except OSError as error:
            plain = files.unwritable(self.path, error) or error
            full = isinstance(plain, files.Unwritable)
            raise (self._going_on(plain) if full else plain) from error

    def _going_on(self, error: files.Unwritable) -> files.Unwritable:
        """With how a run that a full disk ended goes on: the same command is refused."""
        going = self.run.going_on()
        if going["resume"]:
            return error.by("go on with --resume (in place of --overwrite)")
        return error.by("begin anew with --overwrite") if going["overwrite"] else error

    def start(self, run: Mapping[str, Any], template: str | None = None) -> None:
        """Begin a new run here; nothing of an older run survives it, and nothing of others goes.

        template: the chat template of training, where it is not the model's own; `fuse` takes it.
        """
        self.run.write_record(run, self._clear)  # the folder's mark, before anything else is in it
        if template is not None:
            files.write_text(self.path / TEMPLATE, template)

    def _clear(self) -> None:
        """Take an older run's files away, and none of others."""
        (self.path / STATE).unlink(missing_ok=True)  # first: half a folder must not be resumed
        best = self.path / "best"
        numbered = (p for p in files.listed(self.path, f"*{NUMBERED}") if is_numbered(p.name))
        pairs = (
            folder / name
            for folder in (self.path, best)
            for name in (adapters.WEIGHTS, adapters.CONFIG)
        )
        for old in (*numbered, *pairs, self.path / METRICS, self.path / TEMPLATE):
            old.unlink(missing_ok=True)
        for folder in (best, (self.path / STATE).parent):
            with suppress(OSError):  # not there, or it holds things of others
                folder.rmdir()

    def resumed(self, run: Mapping[str, Any], iteration: int) -> None:
        """Note in run.json what a resumed run has changed of its settings, and since when; and
        which adapters it had, by which `report` knows older results of a folder that moved.
        """
        before = self.run.noted()
        digest = files.known_digest(self.path / adapters.WEIGHTS)
        had = dict.fromkeys((*before.get(EARLIER, ()), *([digest] if digest else ())))
        parts: dict[str, Any] = {EARLIER: list(had)} if had else {}
        old, new = before.get("settings", {}), json.loads(json.dumps(run["settings"]))
        free = set(named("may_change")) - {"adapter_path"}  # this very folder
        was = {n: old[n] for n in sorted(free) if n in old and n in new and old[n] != new[n]}
        if was:
            changes = [*before.get("changes", []), {"iteration": iteration, "before": was}]
            parts |= {"settings": old | {n: new[n] for n in was}, "changes": changes}
        self.note(parts)

    def note(self, parts: Mapping[str, Any]) -> None:
        """Add parts to run.json."""
        self.run.note(parts)

    def log(self, entry: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to metrics.jsonl."""
        progress.metrics_bytes += self.run.log(entry)

    def rewind_log(self, progress: Progress) -> None:
        """Drop the lines that were written after the state was saved."""
        progress.metrics_bytes = self.run.rewind_log(progress.metrics_bytes)


@dataclass(frozen=True)
class NoFolder:
    """In the place of an `AdapterFolder`, for all but the first of several processes: no trace."""

    path: Path  # of the first one's

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    save_adapters = save_part = save_best = save_state = start = _nothing
    resumed = note = log = rewind_log = _nothing

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield


Folder = AdapterFolder | NoFolder


def load_state(
    path: Path, model: nn.Module, optimizer: Optimizer
) -> tuple[Progress, dict[str, mx.array], dict[str, mx.array]]:
    """Put a saved state back. Returns: progress, the reference's adapters and the good ones.

    Raises: ModelError when the file is damaged or belongs to another adapter.
    """
    arrays, progress, (high, low) = _read_state(path)

    def part(name: str) -> dict[str, mx.array]:
        return {k[len(name) + 1 :]: v for k, v in arrays.items() if k.startswith(name + ".")}

    own, saved = dict(adapters.parameters(model)), part("adapter")
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in saved.items()}:
        raise ModelError(
            f"{path} holds other adapters than this run's; check --num-layers. (A run of an older "
            "version may have adapters behind the SAE within its block: begin it anew.)"
        )
    adapters.update(model, saved)
    optimizer.state = tree_unflatten(list(part("optimizer").items()))
    randomness.go_to((high << 32) | low)
    return progress, part("reference"), part("good")


def saved_progress(folder: Path) -> Progress:
    """Where the run in the folder stands. Raises: ModelError when its state is damaged."""
    return _read_state(folder / STATE)[1]


def _read_state(path: Path) -> tuple[dict[str, mx.array], Progress, list[int]]:
    try:
        arrays, metadata = read_arrays(path)
        progress = Progress(**{"judged_by": AS_TRAINED, **json.loads(metadata["progress"])})
        high, low = cast("list[int]", arrays["random"].tolist())
        return arrays, progress, [high, low]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). Start the run anew in another --adapter-path. Its "
            "numbered adapters, in the folder above, are still good; copy them first where it is "
            "to be the same: --overwrite removes them."
        ) from error


def interrupted(iteration: int, folder: Path, config: TrainConfig, code: int) -> Interrupted:
    """What a run that was asked to stop ends with, once all is saved."""
    how = " in place of --overwrite" if config.overwrite else ""
    return Interrupted(
        f"stopped after iteration {iteration}; everything is in {folder}. Go on with the same "
        f"command and --resume{how}.",
        exit_code=code,
    )


def is_numbered(name: str) -> bool:
    """Whether a run wrote this file: the user's own may be called much alike."""
    return re.fullmatch(rf"\d{{7,}}{re.escape(NUMBERED)}", name) is not None


def run_folder(path: Path) -> RunFolder:
    return RunFolder(path, STATE, "--adapter-path")


def check_resumable(folder: Path, run: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the settings that would change the trajectory."""
    defaults = {name: default_of(field) for name, field in options().items()}
    free = {*named("may_change"), *named("by_content")}
    # without validation its pairs are not read
    run_folder(folder).check_resumable(run, free, defaults, {"valid": "val_batches"})
