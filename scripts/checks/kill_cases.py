"""What kill_test.py kills: a tiny place to work in, the commands, and what must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpo_mlx.storage.locks import owner

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "seconds", "time"}
STATE = "checkpoint/state.safetensors"
OVER = "--overwrite"
LOG = "metrics.jsonl"
VERDICTS = "verdicts.jsonl"
Known = dict[str, set[str]]  # digests that a file of this name may have


@dataclass
class Case:
    """One command, begun again and again in the same stage folder.

    before: what lies at `target` when it begins. known: what `reference_run` learned.
    """

    name: str
    words: list[str]
    target: Path
    before: Path | None = None
    checks: Callable[[Case], list[str]] = lambda case: []
    again: Callable[[Case], list[str] | None] = lambda case: case.words
    seconds: float = 0.0  # of the run that nobody killed
    steps: int = 0  # its file operations
    known: Known = field(default_factory=dict)
    lines: set[str] = field(default_factory=set)
    grown: dict[str, list[str]] = field(default_factory=dict)  # files of lines, at the end
    wanted: dict[str, str] = field(default_factory=dict)  # the whole result

    def reset(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir(parents=True)
        if self.before is not None:
            shutil.copytree(self.before, self.target)


def build_place(root: Path, plan: list[Case]) -> None:
    """What these cases read: a model, SAEs, pairs, and what commands make of them, in a child."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny_models
    from helpers import random_sae

    from fpo_mlx.cli import main
    from fpo_mlx.records import Site
    from fpo_mlx.sae.convert import write_saelens

    made = needed(root, plan)
    if any(f"{root}/model" in words for words in (*made, *(case.words for case in plan))):
        tiny_models.tiny_llama(root / "model", tokenizer=True, num_hidden_layers=2)
    for name, seed in (("sae", 1), ("sae2", 2)):
        write_saelens(_with_decoder(random_sae("topk", 32, Site(1), seed)), root / name)
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": f"Well, {n} or so"}
        for n in range(14)
    ]
    for name, part in (("data", rows), ("part", rows[:6])):
        (root / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in part)
        (root / name / "train.jsonl").write_text(text)
        valid = {**rows[0], "prompt": "Held out?"}
        (root / name / "valid.jsonl").write_text(json.dumps(valid) + "\n")
    (root / "prompts.txt").write_text("".join(f"Question {n}?\n" for n in range(40)))
    (root / "rank4.yaml").write_text("lora_parameters: {rank: 4, scale: 3.0}\n")
    for words in made:
        main(words, standalone_mode=False)
    if (root / "stage" / "adapters").exists():
        shutil.move(root / "stage" / "adapters", root / "half")


def needed(root: Path, plan: list[Case]) -> list[list[str]]:
    """The commands whose results these cases read, and those whose results these commands read."""
    train = ["train", *_training(root), "--iters"]
    makers = {
        "ref": ["precompute", *_usual(root), "--output", f"{root}/ref"],
        "ref-part": ["precompute", *_usual(root, data="part"), "--output", f"{root}/ref-part"],
        "a": [*train, "2", "--seed", "9", "--adapter-path", f"{root}/a"],
        "b": [*train, "2", "--seed", "8", "-c", f"{root}/rank4.yaml", "--adapter-path",
              f"{root}/b"],
        "half": [*train, "3", "--adapter-path", f"{root}/stage/adapters"],
        "fused": ["fuse", "--model", f"{root}/model", "--adapter-path", f"{root}/a", "--save-path",
                  f"{root}/fused"],
        "made": ["sae", "convert", f"{root}/sae", "--output", f"{root}/made"],
        "candidates.jsonl": ["pairs", "generate", *_answering(root), "--output",
                             f"{root}/candidates.jsonl"],
        VERDICTS: ["pairs", "judge", f"{root}/candidates.jsonl", "--reward", "brevity", "--output",
                   f"{root}/{VERDICTS}"],
    }  # fmt: skip
    read = {word for case in plan for word in (*case.words, str(case.before))}
    found: list[list[str]] = []
    for name, words in reversed(makers.items()):
        if f"{root}/{name}" in read:
            found.insert(0, words)
            read.update(words)
    return found


def _with_decoder(sae: Any) -> Any:
    from dataclasses import replace

    import numpy as np

    return replace(sae, w_dec=sae.w_enc.T.copy(), b_dec=np.zeros(32, np.float32), b_in=None)


def _usual(root: Path, data: str = "data") -> list[str]:
    flags = {"model": root / "model", "sae": root / "sae", "data": root / data}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _training(root: Path) -> list[str]:
    flags = {
        "top-k": 5, "batch-size": 1, "steps-per-report": 2, "steps-per-eval": 4, "save-every": 3,
        "num-layers": 1, "learning-rate": 0.001, "reference": root / "ref",
    }  # fmt: skip
    return _usual(root) + [word for name, v in flags.items() for word in (f"--{name}", str(v))]


def _answering(root: Path) -> list[str]:
    flags = {"model": root / "model", "prompts": root / "prompts.txt", "n": 3, "max-tokens": 12}
    return [word for name, v in (flags | {"rows": 4}).items() for word in (f"--{name}", str(v))]


def cases(root: Path) -> list[Case]:
    stage = root / "stage"
    train = ["train", *_training(root), "--iters", "12", "--adapter-path", f"{stage}/adapters"]
    fuse = ["fuse", "--model", f"{root}/model", "--adapter-path", f"{root}/b"]
    convert = ["convert", "--hf-path", f"{root}/model", "--mlx-path", f"{stage}/q", "--quantize"]
    sae = ["sae", "convert", f"{root}/sae2", "--dtype", "float16", "--output", f"{stage}/sae", OVER]
    fill = ["precompute", *_usual(root), "--output", f"{stage}/ref"]
    answer = ["pairs", "generate", *_answering(root), "--output", f"{stage}/made/candidates.jsonl"]
    judge = ["pairs", "judge", f"{root}/candidates.jsonl", "--reward", "brevity"]
    build = ["pairs", "build", f"{root}/candidates.jsonl", "--verdicts", f"{root}/{VERDICTS}"]
    files: dict[str, Any] = {"checks": every_file_is_known}
    folder: dict[str, Any] = {"checks": the_folder_is_old_or_new}
    return [
        Case("precompute", fill, stage / "ref", **files),
        Case("precompute (more)", fill, stage / "ref", root / "ref-part", **files),
        Case("train", train, stage / "adapters", again=resume_if_possible, **files),
        Case("train (over old)", [*train, OVER], stage / "adapters", root / "b",
             again=resume_if_possible, **files),
        Case("train --resume", [*train, "--resume"], stage / "adapters", root / "half", **files),
        Case("fuse", [*fuse, "--save-path", f"{stage}/fused", OVER], stage / "fused",
             root / "fused", **folder),
        Case("convert", [*convert, "--q-group-size", "32"], stage / "q", again=if_not_there,
             **folder),
        Case("sae convert", sae, stage / "sae", root / "made", **folder),
        Case("pairs generate", answer, stage / "made", checks=lines_are_whole),
        Case("pairs judge", [*judge, "--output", f"{stage}/made/{VERDICTS}"], stage / "made",
             checks=lines_are_whole),
        Case("pairs build", [*build, "--keep-cut", "--force", "--output", f"{stage}/pairs"],
             stage / "pairs", again=if_not_there, **folder),
    ]  # fmt: skip


def resume_if_possible(case: Case) -> list[str]:
    """--resume; or --overwrite where nothing of this run was saved that it could go on from."""
    try:
        settings = json.loads((case.target / "run.json").read_text())["settings"]
        mine = settings["iters"] == 12 and (case.target / STATE).is_file()
    except (OSError, ValueError):
        mine = False
    words = [word for word in case.words if word != OVER]
    return [*words, "--resume" if mine else OVER]


def if_not_there(case: Case) -> list[str] | None:
    return None if case.target.exists() else case.words


def digest(path: Path) -> str:
    """sha256 of a file; of what was not measured, where it has such. Raises on a broken file."""
    if path.name in (LOG, VERDICTS):
        return hashlib.sha256("\n".join(log_lines(path)).encode()).hexdigest()
    if path.name.endswith("run.json"):  # under its temporary name, too
        own = ("memory", "earlier")  # measured; the adapters of whenever it was resumed
        told = {k: v for k, v in json.loads(path.read_text()).items() if k not in own}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    import safetensors.numpy

    with safetensors.safe_open(path, "np") as file:
        progress = (file.metadata() or {}).get("progress")
    if progress is None:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    arrays = safetensors.numpy.load_file(path)
    told = json.loads(progress)
    told["window"].pop("seconds", None)
    told.pop("metrics_bytes")  # the clocks' digits
    sums = [[name, hashlib.sha256(arrays[name].tobytes()).hexdigest()] for name in sorted(arrays)]
    return hashlib.sha256(json.dumps([told, sums]).encode()).hexdigest()


def log_lines(path: Path) -> list[str]:
    """The whole lines of metrics.jsonl without their clocks."""
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [
        json.dumps({k: v for k, v in json.loads(line).items() if k not in CLOCKS}, sort_keys=True)
        for line in whole
    ]


def tree(folder: Path) -> dict[str, str]:
    """{relative name: digest} of everything that is not a killed run's leaving."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): digest(path)
        for path in files
        if not path.name.startswith(".tmp-") and not path.name.endswith(".lock")
    }


def every_file_is_known(case: Case) -> list[str]:
    """Each file is the old one, or one that the whole run wrote at some time."""
    found = tree(case.target)
    faults = [
        f"{name} is neither old nor new"
        for name, have in found.items()
        if name != LOG and have not in case.known.get(name, ())
    ]
    log = case.target / LOG
    if log.is_file() and not set(log_lines(log)) <= case.lines:
        faults.append(f"{LOG} has lines that no run wrote")
    return faults + _mixed(case, found)


def lines_are_whole(case: Case) -> list[str]:
    """A file that grows holds the first lines of the whole run's, and perhaps a piece of one."""
    found = {path.name: log_lines(path) for path in case.target.glob("*.jsonl")}
    return [
        f"{name} has other lines than the whole run"
        for name, part in found.items()
        if case.grown[name][: len(part)] != part
    ]


def _mixed(case: Case, found: dict[str, str]) -> list[str]:
    """Weights of one run beside the configuration of another."""
    names = ("adapters.safetensors", "adapter_config.json")
    if case.before is None or not set(names) <= set(found):
        return []
    old = tree(case.before)
    are_old = {found[name] == old.get(name) for name in names}
    same_config = old.get(names[1]) == case.wanted.get(names[1])
    return [] if same_config or len(are_old) == 1 else ["weights and configuration of two runs"]


def the_folder_is_old_or_new(case: Case) -> list[str]:
    old = tree(case.before) if case.before is not None else {}
    found = tree(case.target) if case.target.exists() else {}
    if found in (old, case.wanted) and (found or case.before is None):
        return []
    return [f"the folder is neither old nor new: {', '.join(found) or 'it is gone'}"]


def finished(case: Case, *, rerun: bool) -> list[str]:
    """The result of the run that nobody killed and, after a rerun, nothing beside it.

    Where all was done before the kill there is no rerun, and a lock that no one holds may stay.
    """
    found, faults = tree(case.target), []
    for name in sorted(found.keys() | case.wanted.keys()):
        if found.get(name) != case.wanted.get(name):
            faults.append(f"after the rerun {name} differs from the undisturbed run's")
    stage = case.target.parent
    left = [
        path
        for path in stage.rglob("*")
        if path.name.startswith(".tmp-") or (path.suffix == ".lock" and (rerun or owner(path)))
    ]
    return faults + [f"left behind: {path.relative_to(stage)}" for path in left]
