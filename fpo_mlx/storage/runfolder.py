"""The folder of a run: what it was started with, its log, and whether it can go on.

The same for every kind of training; what a checkpoint holds is the training's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.storage import files, lines
from fpo_mlx.storage.adapter_files import RUN, WEIGHTS
from fpo_mlx.storage.outputs import Made

METRICS = "metrics.jsonl"
# by a fingerprint's name: what it is of, and the split whose size says more
WORDS = {
    "data": ("the training pairs", "train"), "valid": ("the validation pairs", "valid"),
    "model": ("the model's weights", ""), "adapter": ("--init-adapter's weights", ""),
    "saes": ("the SAE", ""), "tokenizer": ("the tokenizer or its chat template", ""),
    "named_features": ("--feature-weights", ""), "projected": ("--project-out", ""),
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """state: the checkpoint's place in the folder; flag: the option that names the folder.

    command: whose runs these are; result: the file that one leaves; whole: only where it ended.
    """

    path: Path
    state: Path
    flag: str
    command: str = "train"
    result: str = WEIGHTS
    whole: bool = False

    @property
    def record(self) -> Path:
        return self.path / RUN

    def write_record(
        self, run: Mapping[str, Any], clear: Callable[[], object] = lambda: None
    ) -> None:
        """run: `settings`, `fingerprints` and what else is to be known of the start.

        clear: takes an older run away; called when the disk has the new record, under another name.
        """
        with files.atomic_path(self.record) as path:
            files.write_json(path, dict(run))
            clear()

    def note(self, parts: Mapping[str, Any]) -> None:
        """Put parts into the record; the others stay. Raises: ModelError where it is damaged."""
        then = "; what was to be added is lost, what the run made is whole."
        files.write_json(self.record, {**self._read_record(then), **parts})

    def noted(self) -> dict[str, Any]:
        """The record; {} where there is none or it is damaged, which `check_resumable` says."""
        return files.known_object(self.record)

    def log(self, entry: Mapping[str, Any]) -> int:
        """Append one line to metrics.jsonl, NaN and infinities as null; its length in bytes."""
        line = json.dumps(files.finite(entry), allow_nan=False) + "\n"
        path = self.path / METRICS
        try:
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(line)
        except OSError as error:
            raise files.unwritable(path, error) or error from error
        return len(line.encode())

    def rewind_log(self, length: int) -> int:
        """Drop what was written after a state was saved, when the log had this length.

        A power cut may have left less, with half a line at its end: that goes too. Returns: the
        length that is left.
        """
        path = self.path / METRICS
        if not path.exists():
            return 0
        with open(path, "rb+") as handle:
            length = min(length, path.stat().st_size)
            length -= len(lines.tail(handle.fileno(), length))
            handle.truncate(length)
        return length

    def going_on(self) -> dict[str, bool]:
        """Settings with which a killed run goes on: from its checkpoint, or anew before the first.

        A new run in an empty folder has neither.
        """
        return {"resume": (self.path / self.state).is_file(), "overwrite": self.stateless}

    @property
    def stateless(self) -> bool:
        """Whether a run began here and has no checkpoint: it had none yet, or has none any more."""
        return self.record.is_file() and not (self.path / self.state).is_file()

    def as_made(self, made: Made) -> Made:
        """What a command makes here, said of a folder that holds it: --resume if that can be."""
        return replace(made, ways="") if self.stateless else made

    def check_own(self) -> None:
        """Raises: ConfigError where the run in the folder is another command's."""
        record = self.noted()
        other = command_of(record)
        if record and other != self.command:
            raise ConfigError(
                f"{self.flag} {self.path}: holds a run of `fpo-mlx {other}`, not of `fpo-mlx "
                f"{self.command}`. Name another folder."
            )

    def check_begun(self) -> None:
        """Raises: ConfigError where there is nothing to go on with, and no end that is whole."""
        self.check_own()
        there = (self.path / self.result).is_file()
        if self.stateless and not there:
            raise ConfigError(
                f"--resume: the run in {self.path} ended before its first checkpoint (--save-every)"
                ", so there is nothing to go on from. Begin it anew: --overwrite in place of "
                "--resume."
            )
        if self.stateless and not self.whole:
            raise ConfigError(
                f"--resume: {self.path} holds {self.result} and no checkpoint, so there is nothing "
                f"to go on from. Use it as it is, or start anew in another {self.flag}."
            )
        if not self.record.is_file():
            raise ConfigError(
                f"--resume: {self.path} holds no checkpoint. Start without --resume, or give the "
                f"{self.flag} of the run to continue."
            )

    def check_resumable(
        self,
        run: Mapping[str, Any],
        may_change: Collection[str],
        defaults: Mapping[str, Any] | None = None,
        needed_by: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The record of the run that is here.

        may_change: settings that are not compared; every fingerprint is that an older version had,
        too. defaults: of settings; one that it did not have yet was at its default. needed_by: of
        some fingerprints the setting that, where it is 0, leaves out what they are of.
        Raises: ConfigError naming the settings that would make this another run, ModelError.
        """
        self.check_begun()
        then = f", so no run can go on from it. Start anew in another {self.flag}."
        before = self._read_record(then)
        now = json.loads(json.dumps(dict(run)))  # tuples become lists
        usual = json.loads(json.dumps(dict(defaults or {})))
        old, new = before["settings"], now["settings"]
        names = (old.keys() | new.keys()) - set(may_change)
        first = {**usual, **old}
        faults = [f"  {_changed('settings', n, first, new)}" for n in _differing(names, first, new)]
        both = (first, {**usual, **new})
        unread = {
            n for n, by in dict(needed_by or {}).items() if not all(s.get(by, 1) for s in both)
        }
        old, new = before["fingerprints"], now["fingerprints"]
        others = _differing(old.keys() - unread, old, new)
        sizes = [found for one in (before, now) if isinstance(found := one.get("splits"), dict)]
        faults += [
            f"  {_in_words(n, sizes)}; {_changed('fingerprints', n, old, new)}" for n in others
        ]
        if faults:
            raise ConfigError(
                f"--resume: these settings would make another run of {self.path}:\n"
                + "\n".join(faults)
                + f"\nUse the old values{' and files' if others else ''}, or start anew in another "
                f"{self.flag}."
            )
        return before

    def _read_record(self, then: str) -> dict[str, Any]:
        try:
            found = files.read_object(self.record)
            if not all(isinstance(found[part], dict) for part in ("settings", "fingerprints")):
                raise TypeError("settings or fingerprints are no objects")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{self.record} is damaged ({error!r}){then}") from error
        return found


def command_of(record: Mapping[str, Any]) -> str:
    """Whose run a record is of."""
    return "sae train" if "plan" in record else "train"


def _differing(names: Iterable[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Those of the names that have another value now."""
    return [name for name in sorted(names) if old.get(name) != new.get(name)]


def _changed(section: str, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{section}.{name}: was {old.get(name)!r}, now {new.get(name)!r}"


def _in_words(name: str, sizes: Sequence[Mapping[str, Any]]) -> str:
    """What a fingerprint is of. sizes: of the splits, then and now, where they are known."""
    what, split = WORDS.get(name, (name, ""))
    counts = [one.get(split) for one in sizes]
    told = f" ({counts[0]} then, {counts[1]} now)" if split and len(set(counts)) == 2 else ""
    return f"{what}: not what the run began with{told}"
