"""A run's files as plain records. What is missing or damaged is noted, never guessed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fpo_mlx.errors import FpoError
from fpo_mlx.records import BASE, PAIRS_FILE, ROUND_FILE
from fpo_mlx.report.names import unique_names
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import CONFIG, EARLIER, RUN, WEIGHTS, run_of
from fpo_mlx.storage.outputs import same_place
from fpo_mlx.storage.runfolder import command_of


@dataclass(frozen=True)
class Result:
    """What a file of another command says of a run; `stale` when its adapters changed since."""

    path: Path
    value: Any
    stale: bool = False


@dataclass(frozen=True)
class Run:
    """One adapter folder, as far as it is there."""

    name: str  # of the folder; unique within a report
    path: Path
    record: Mapping[str, Any] = field(default_factory=dict)  # run.json
    adapter: Mapping[str, Any] = field(default_factory=dict)  # adapter_config.json
    digest: str | None = None  # sha256 of its adapters.safetensors
    train: Sequence[Mapping[str, Any]] = ()  # metrics.jsonl, kind "train"
    valid: Sequence[Mapping[str, Any]] = ()  # metrics.jsonl, kind "valid"
    skipped: Sequence[Mapping[str, Any]] = ()  # metrics.jsonl, kind "skipped": updates left out
    landed: Sequence[Mapping[str, Any]] = ()  # kind "landed": a part of the change that was saved
    results: Mapping[str, Result] = field(default_factory=dict)  # evaluate, features, compare
    pairs: Mapping[str, Any] = field(default_factory=dict)  # pairs.json of its data
    round: Mapping[str, Any] = field(default_factory=dict)  # round.json, of `fpo-mlx rounds`
    best: Sequence[Run] = ()  # its best/, where that has figures of its own
    faults: tuple[str, ...] = ()  # files that could not be read

    @property
    def settings(self) -> Mapping[str, Any]:
        return part(self.record, "settings")

    @property
    def end(self) -> Mapping[str, Any]:
        """What says that a part of the change was saved; empty where training went on from there,
        and where all of it was saved.
        """
        landed = self.landed[-1] if self.landed else {}
        ended = figure(landed.get("iteration"))
        others = (*self.train[-1:], *self.valid[-1:], *self.skipped[-1:])
        later = [n for one in others if (n := figure(one.get("iteration"))) is not None]
        return {} if ended is None or any(n > ended for n in later) else landed

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        return part(self.record, "fingerprints")

    @property
    def digests(self) -> list[Any]:
        """sha256 of its adapters, and of those that it had whenever it was resumed."""
        found = self.record.get(EARLIER)
        return [self.digest, *(found if isinstance(found, list) else ())]


def part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping within a mapping; empty where there is none."""
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def figure(value: Any) -> float | None:
    """A number as float, NaN and infinity too; None for whatever else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def read_runs(paths: Sequence[Path], results: Sequence[Path] = ()) -> list[Run]:
    """Run folders, and result files that lie elsewhere or speak of several adapters.

    A folder of `fpo-mlx rounds` stands for the runs of all its rounds.

    Raises: FpoError for a folder that is not there or holds no run, and for a result file that
    cannot be read or is of none of these runs.
    """
    paths = [folder for path in paths for folder in _rounds_in(path) or [path]]
    names = unique_names(paths)
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    for file in results:
        runs = _with_result(runs, file)
    return runs


def _rounds_in(path: Path) -> list[Path]:
    """Adapter folders of the rounds below, the first one first; none where `path` is a run."""
    found = {
        int(folder.name.removeprefix("round-")): folder / "adapters"
        for folder in (files.listed(path, "round-*") if path.is_dir() else ())
        if folder.name.removeprefix("round-").isdigit() and (folder / "adapters").is_dir()
    }
    return [found[number] for number in sorted(found)]


def _with_result(runs: Sequence[Run], file: Path) -> list[Run]:
    faults: list[str] = []
    value = _read(file, faults)
    if faults:
        raise FpoError(f"--results {faults[0]}.")
    kind, alone = kind_of(value), len(runs) == 1
    parts = [_of_run(run, value, file, alone=alone) for run in runs]
    if not any(parts):
        raise FpoError(
            f"--results {file}: found nothing of {', '.join(run.name for run in runs)}, wanted "
            "the JSON that `fpo-mlx evaluate`, `features` or `compare` wrote of these runs. One "
            "that names no adapter belongs into the folder of its run."
        )
    if kind == "compare":  # the same answers stand once, whoever they are of
        parts = [p if not any(parts[:i]) else None for i, p in enumerate(parts)]
    both = zip(runs, parts, strict=True)
    return [_with_one(run, kind, found) if found and kind else run for run, found in both]


def _with_one(run: Run, kind: str, result: Result) -> Run:
    """The run with a result that was named, unless it has one that says more of it."""
    held = run.results.get(kind)
    if held and standing(held) > standing(result):
        told = (
            f"{result.path} is not shown, {held.path} is: held-out pairs come before training "
            "pairs, the whole adapter before a part or an older one. Move that one away to see "
            "the other."
        )
        return replace(run, faults=(*run.faults, told))
    return replace(run, results={**run.results, kind: result})


def standing(result: Result) -> tuple[bool, bool, bool]:
    """What counts before the time: held-out pairs before those of training, all before a part."""
    return not on_training(result.value), scale_of(result.value) == 1.0, not result.stale


def on_training(evaluation: Any) -> bool:
    """Whether a result says that the pairs which it is over were those of training."""
    if not isinstance(evaluation, Mapping):
        return False
    return evaluation.get("split") == "train" or evaluation.get("trained_on") is True


def scale_of(evaluation: Any) -> float:
    """The part of the adapter's change that was judged; 1 where nothing is said."""
    found = evaluation.get("adapter_scale") if isinstance(evaluation, Mapping) else None
    scale = figure(found)
    return 1.0 if scale is None else scale


def _of_run(
    run: Run, value: Any, file: Path, *, own: bool = False, alone: bool = False
) -> Result | None:
    """What a result file says of the run, of its present adapters first; None where of others.

    own: the file lies in the folder or bears its name. alone: there is no other run that a file
    that names no adapter could be of.
    """

    def is_ours(one: Mapping[str, Any]) -> bool:
        if "adapter_path" not in one:  # version 0.1 did not say
            return own or alone
        if not isinstance(name := one["adapter_path"], str):  # null: the base alone
            return False
        path, home = Path(name), run.path.resolve()
        if is_of(name, home) or (own and _ends_in(home, path.parts)):
            return True  # the same path, here or where the command ran
        if run.digest and (then := one.get("adapter_sha256")):
            return then in run.digests
        lone = "adapters" not in value and run_of(path) == path  # not best/
        older = lone and not one.get("adapter_sha256")  # an older version's, of a run that moved
        return own and (older or path.name == home.name)

    def order(found: Result) -> tuple[bool, bool, float]:
        elsewhere = not is_of(found.value.get("adapter_path"), run.path)
        return found.stale, elsewhere, abs(scale_of(found.value) - 1)

    ours = [Result(file, one, _stale(one, file, run)) for one in _named(value) if is_ours(one)]
    return min(ours, key=order, default=None)


def _named(value: Any) -> list[Mapping[str, Any]]:
    """What a result file says, once for each adapter that it names."""
    kind = kind_of(value)
    if kind == "compare":
        rows = value["prompts"] if isinstance(value.get("prompts"), list) else []
        answers = [part(row, "answers") for row in rows if isinstance(row, Mapping)]
        digests, names = part(value, "adapter_sha256"), {n for one in answers for n in one} - {BASE}
        return [
            {**value, "adapter_path": re.sub(r"\*[-+.\de]+$", "", name)}  # without its part
            | {"adapter_sha256": digests.get(name)}
            for name in sorted(names)
        ]
    if kind == "evaluate" and isinstance(value.get("adapters"), list):
        shared = {name: value[name] for name in ("base", "split") if name in value}
        return [{**one, **shared} for one in value["adapters"] if isinstance(one, Mapping)]
    return [value] if kind else []


def _stale(one: Mapping[str, Any], file: Path, run: Run) -> bool:
    """Whether the adapters changed since; of a file without their digest its time says so."""
    if then := one.get("adapter_sha256"):
        return run.digest not in (None, then)
    weights = run.path / WEIGHTS
    return weights.exists() and file.stat().st_mtime < weights.stat().st_mtime


def is_of(name: Any, folder: Path) -> bool:
    """Whether an adapter path that a command was given means this folder."""
    return isinstance(name, str) and same_place(Path(name), folder)


def _ends_in(folder: Path, parts: Sequence[str]) -> bool:
    """Whether a folder's path ends in these names, or in what its disk takes for the same."""
    if not parts or folder.parts[-len(parts) :] == tuple(parts):
        return bool(parts)
    if len(parts) >= len(folder.parts) or ".." in parts:
        return False
    return same_place(folder.parents[len(parts) - 1].joinpath(*parts), folder)


def read_run(path: Path, name: str) -> Run:
    """One folder. Raises FpoError when it is not there or holds no run."""
    if not path.is_dir():
        raise FpoError(f"{path}: no such folder. Give the --adapter-path of a `fpo-mlx train` run.")
    if not any((path / known).is_file() for known in ("run.json", "metrics.jsonl")):
        raise FpoError(
            f"{path}: found neither run.json nor metrics.jsonl, wanted the folder of a "
            "`fpo-mlx train` run (its --adapter-path)."
        )
    faults: list[str] = []
    record, adapter = (_mapping(path / own, faults) for own in (RUN, CONFIG))
    if command_of(record) == "sae train" and not (path / CONFIG).exists():
        raise FpoError(
            f"{path}: this is the run of `fpo-mlx sae train`, wanted that of `fpo-mlx train` (its "
            "--adapter-path). What an SAE is worth is in its README.md; `fpo-mlx sae evaluate` "
            "judges it."
        )
    reports = _lines(path / "metrics.jsonl", faults)
    train, valid, skipped, landed = (
        [r for r in reports if r.get("kind") == k] for k in ("train", "valid", "skipped", "landed")
    )
    digest = files.known_digest(path / WEIGHTS)
    run = Run(name, path, record, adapter, digest, train, valid, skipped, landed)
    results = _results(run, faults)
    pairs, around = _pairs_of(path, record, faults), _mapping(path.parent / ROUND_FILE, faults)
    best = _best_of(run, faults)
    return replace(run, results=results, pairs=pairs, round=around, best=best, faults=tuple(faults))


def _best_of(run: Run, faults: list[str]) -> Sequence[Run]:
    """What lies in best/ of the adapters that are there now."""
    path = run.path / "best"
    own = Run(f"{run.name}/best", path, run.record, digest=files.known_digest(path / WEIGHTS))
    found = _results(own, faults) if own.digest else {}
    within = {k: r for k, r in found.items() if r.path.parent == path and not r.stale}
    return [replace(own, results=within)] if within else ()


def _pairs_of(path: Path, record: Mapping[str, Any], faults: list[str]) -> Mapping[str, Any]:
    """Figures beside the data that a run was trained on, or of the round it belongs to."""
    source = part(record, "source")
    recorded, then = source.get("data"), source.get("pairs")
    places = [Path(recorded)] if isinstance(recorded, str) and recorded else []
    places += _named_data(path, part(record, "settings"))
    found = [file for place in places if (file := place / PAIRS_FILE).is_file()]
    if found and "pairs" in source and files.known_digest(found[0]) != then:
        faults.append(f"{found[0]} was written after the run began, so it was left out")
        return {}
    of_round = re.fullmatch(r"round-\d+", path.parent.name)
    file = found[0] if found else path.parent / "pairs" / PAIRS_FILE
    return _mapping(file, faults) if found or of_round else {}


def _named_data(path: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The data as the run was told, from where it was told so; [] where that is not known.

    A run of a relative --adapter-path ran where its folder's path begins.
    """
    data, own = settings.get("data"), settings.get("adapter_path")
    if not isinstance(data, str) or not data:
        return []
    if Path(data).is_absolute():
        return [Path(data)]
    folder, parts = path.resolve(), Path(own).parts if isinstance(own, str) else ()
    if not _ends_in(folder, parts) or Path(*parts).is_absolute():  # which says not where it ran
        return []
    return [folder.parents[len(parts) - 1] / data]


def _read(path: Path, faults: list[str]) -> Any:
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return None


def _mapping(path: Path, faults: list[str]) -> Mapping[str, Any]:
    """The file's object; {} where there is no file, and with a fault where it cannot be read."""
    value = _read(path, faults) if path.exists() else {}
    if isinstance(value, Mapping):
        return value
    if value is not None:
        faults.append(f"{path} holds {type(value).__name__}, wanted a JSON object")
    return {}


def _lines(path: Path, faults: list[str]) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return []
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
        except ValueError as error:
            faults.append(f"{path}:{number} is no JSON and was left out: {error}")
            continue
        if isinstance(row, Mapping):
            rows.append(row)
    return rows


def _results(run: Run, faults: list[str]) -> dict[str, Result]:
    """Results of other commands: in the folder, or beside it as NAME.json or NAME.*.json.

    They are known by what they hold, not by their names. Of a kind the newest counts, but first
    what is of held-out pairs, and of the whole adapter.
    """
    inside = [p for p in files.listed(run.path, "*.json") if p.name not in (RUN, CONFIG)]
    home = run.path.resolve()
    folders = [p.name for p in files.listed(home.parent) if p.is_dir()]
    outside = [
        p for p in files.listed(home.parent, "*.json") if _is_name(_owner(p.name, folders), home)
    ]
    found: dict[str, Result] = {}
    others: dict[str, str] = {}  # what is of another adapter; told where it is all there is
    for file in sorted((*outside, *inside), key=lambda p: p.stat().st_mtime):
        value = _read(file, faults)
        kind, ours = kind_of(value), _of_run(run, value, file, own=True)
        if kind and ours and (kind not in found or standing(ours) >= standing(found[kind])):
            found[kind] = ours
        names = [name for one in _named(value) if (name := one.get("adapter_path"))]
        if kind and names and not ours:
            others[kind] = f"{file} is of another adapter, {names[0]}, and was left out"
    faults += [told for kind, told in others.items() if kind not in found]
    return found


def _owner(file: str, folders: Sequence[str]) -> str | None:
    """The folder that a file beside it is named after: of `fpo.long.json` fpo.long before fpo."""
    named = [folder for folder in folders if file.startswith(f"{folder}.")]
    return max(named, key=len, default=None)


def _is_name(name: str | None, folder: Path) -> bool:
    """Whether the folder has this name; other letter case and Unicode form as its disk has it."""
    if name is None or name == folder.name:
        return name is not None
    plain = [unicodedata.normalize("NFC", each).casefold() for each in (name, folder.name)]
    return plain[0] == plain[1] and same_place(folder.with_name(name), folder)


def kind_of(value: Any) -> str | None:
    """Which command wrote this; None when it was none of those that a report shows.

    Files of version 0.1 do not say: they are known by what they hold.
    """
    if not isinstance(value, Mapping):
        return None
    if "kind" in value:
        return value["kind"] if value["kind"] in ("evaluate", "features", "compare") else None
    if "summary" in value or "adapters" in value:
        return "evaluate"
    if "features" in value:
        return "features"
    if "prompts" in value:
        return "compare"
    return None
