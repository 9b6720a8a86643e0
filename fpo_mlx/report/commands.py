"""The next commands for a run's adapters, with its settings, quoted for a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from fpo_mlx.config import PARTS, DataConfig, Objective, ReferenceConfig
from fpo_mlx.report.read import Run, figure, on_training, part, scale_of
from fpo_mlx.report.tables import defaults, judged, text
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import WEIGHTS

HELD_OUT = "HELD_OUT.jsonl"  # stands for a file of other pairs, where the run's data have no others
SPLITS = {  # what a command looks at: the first by itself
    "evaluate": ("test", "valid"), "features": ("valid", "test"), "compare": ("valid", "test"),
}  # fmt: skip
OBJECTIVE = tuple(f.name for f in fields(Objective) if not f.metadata["yaml_only"])
READ = ("model", "sae", "data", "objective", "init_adapter", "reference") + tuple(
    field.name
    for section in (DataConfig, ReferenceConfig)
    for field in fields(section)
    if field.name not in ("model", "sae", "data") and not field.metadata["yaml_only"]
)
FUSED = ("model", "trust_remote_code")  # the adapter folder holds the template
CHAT = (*FUSED, "chat_template", "chat_template_args")
COMPARED = ("model", "data", "trust_remote_code", "init_adapter") + tuple(
    field.name for field in fields(DataConfig) if field.name != "data"
)


def commands(run: Run) -> list[str]:
    """What to do with the adapters, quoted for a shell: the last ones, or better ones in best/."""
    best = better(run)
    adapter = ["--adapter-path", str(best or run.path)]
    talked, fused_by = (_given(run, names, run.settings) for names in (CHAT, FUSED))
    fused = _free(Path(f"{run.path}-fused"))
    return [
        command(run, "evaluate", best),
        command(run, "compare", best),
        shlex.join(["fpo-mlx", "chat", *talked, *adapter]),
        shlex.join(["fpo-mlx", "fuse", *fused_by, *adapter, "--save-path", str(fused)]),
    ]


def _free(place: Path) -> Path:
    """The place, or the first with a number behind it at which nothing lies."""
    numbered = (place.with_name(f"{place.name}-{n}") for n in count(2))
    return place if not place.exists() else next(one for one in numbered if not one.exists())


def better(run: Run) -> Path | None:
    """best/, where a validation after it was worse; None for the last adapters.

    Of a run with a target, best/ is held to none.
    """
    targets = (run.settings.get("target_drift"), run.settings.get("target_kl"))
    best = lowest(run)
    if best is None or run.landed or targets != (None, None):
        return None
    kept, last = (figure(one.get("iteration")) for one in (best, run.valid[-1]))
    if not kept or kept == last:
        return None
    return run.path / "best" if (run.path / "best" / WEIGHTS).is_file() else None


def lowest(run: Run) -> Mapping[str, Any] | None:
    """The validation of the lowest loss, whose adapters best/ has."""
    return next((one for one in reversed(run.valid) if one.get("best") is True), None)


def command(run: Run, kind: str, adapter: Path | None = None) -> str:
    """`evaluate`, `features` or `compare` of a run, or of another adapter that it made."""
    folder = adapter or run.path
    less = kind == "evaluate" and (on_training(judged(run)) or scale_of(judged(run)) != 1.0)
    to = folder / (f"{kind}.whole.json" if less and not adapter else f"{kind}.json")
    words = ["fpo-mlx", kind, *_usual(run, kind), "--adapter-path", str(folder)]
    words += ["--output" if kind == "compare" else "--json", str(to), *overwritten(run, to)]
    return shlex.join(words)


def overwritten(run: Run, place: Path) -> list[str]:
    """`--overwrite` where an older training's result lies in the place."""
    stale = any(found.stale and found.path == place for found in run.results.values())
    try:
        older = place.stat().st_mtime < (run.path / WEIGHTS).stat().st_mtime
    except OSError:
        older = False
    return ["--overwrite"] if stale or older else []


def held_out_splits(run: Run) -> set[str] | None:
    """Those of valid and test that the run's data have; None where nothing says so."""
    if known := part(run.record, "splits"):
        return {"valid", "test"} & set(known)
    data = text(run.settings.get("data") or "DATA")  # the record of an older version does not say
    found = {name for name in ("valid", "test") if Path(data, f"{name}.jsonl").is_file()}
    if run.settings.get("valid_share") or run.valid:
        found.add("valid")
    if run.settings.get("test_split"):
        found.add("test")
    return found if found or data.endswith(".jsonl") else None


def of_others(run: Run) -> bool:
    """Whether the commands want a file of other pairs: the run's data hold none out."""
    return held_out_splits(run) == set()


def _usual(run: Run, kind: str) -> list[str]:
    """The run's settings that a command takes and that are not its defaults, and the split.

    Data of which all was trained on are no data to judge on: the command is told of others.
    """
    names, there = _taken(run, kind), held_out_splits(run)
    if not _reference_serves(run):
        names = tuple(name for name in names if name != "reference")
    data = text(run.settings.get("data") or "DATA")
    if there is not None and not there:
        names, data = tuple(name for name in names if name not in PARTS), HELD_OUT
    words = _given(run, names, {**run.settings, "data": data})
    first, other = SPLITS[kind]
    return words + (["--split", other] if there and first not in there else [])


def _taken(run: Run, kind: str) -> tuple[str, ...]:
    """The settings that a command is told. `evaluate` finds the objective in run.json itself."""
    if kind == "compare":
        return COMPARED
    known = kind == "evaluate" and "objective" in run.settings
    if known and run.settings.get("constraint") != "activations":  # these it wants to be told
        return tuple(name for name in READ if name != "objective") + ("feature_weights",)
    return READ + OBJECTIVE


def _reference_serves(run: Run) -> bool:
    """Whether commands that judge take the run's cache: `train` took one of other weights, too."""
    if run.settings.get("project_out"):  # its scores are those without these directions
        return False
    manifest = files.known_object(Path(text(run.settings.get("reference")), "manifest.json"))
    scored, own = part(manifest, "identity").get("model"), run.fingerprints.get("model")
    return None in (scored, own) or scored == own


def _given(run: Run, names: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """The words of those settings that are not what a command takes by itself."""
    chosen = {**settings, "model": settings.get("model") or "MODEL"}
    default = defaults(run)
    return [
        word
        for name in names
        if name in chosen and text(chosen[name]) != text(default.get(name))
        for word in _words("--" + name.replace("_", "-"), chosen[name])
    ]


def _words(flag: str, value: Any) -> Iterator[str]:
    """A setting as the command line has it."""
    if value is None:
        return
    if isinstance(value, bool):
        yield flag if value else f"--no-{flag[2:]}"
        return
    if isinstance(value, Mapping):
        yield from (flag, json.dumps(value))
        return
    for one in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
        yield from (flag, str(one) if isinstance(one, int | float) else text(one))
