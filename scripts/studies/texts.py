"""Shared by the studies: their options, steps that outlive a kill, pairs, what a bullet list is."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fpo_mlx.demo import smollm2
from fpo_mlx.storage import files
from fpo_mlx.storage.runfolder import RunFolder

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SHORT = 850  # characters of a prompt and its longer answer, as JSON
ITEM = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)


def is_list(text: str) -> bool:
    """Two or more lines that begin with a bullet or a number."""
    return len(ITEM.findall(text)) >= 2


def rows(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in content))
    return path


def short_pairs(source: Path, folder: Path, held_out: dict[str, int]) -> Path:
    """Pairs of some 200 tokens at most, so that a run takes minutes; the last are held out.

    held_out: splits beside train, with their sizes; the last one is the last rows.
    """
    every = [*rows(source / "train.jsonl"), *rows(source / "valid.jsonl")]
    left = [row for row in every if _size(row) < SHORT]
    for split, count in reversed(held_out.items()):
        write_rows(folder / f"{split}.jsonl", left[-count:])
        left = left[:-count]
    write_rows(folder / "train.jsonl", left)
    return folder


def _size(row: Mapping[str, Any]) -> int:
    sides = (json.dumps(row["chosen"]), json.dumps(row["rejected"]))
    return len(json.dumps(row["prompt"])) + max(map(len, sides))


def answers_apart(
    pairs: Iterable[Mapping[str, Any]],
    shows: Callable[[str], bool],
    count: int,
    folder: Path,
    characters: int | None = None,
) -> tuple[Path, Path]:
    """Chosen answers that show a behaviour and that do not, by one writer; `count` of each at most.

    They lie in with.jsonl and without.jsonl of the folder, in the order of the pairs; characters:
    of each no more than its first.
    """
    answers = [{"prompt": row["prompt"], "response": row["chosen"][:characters]} for row in pairs]
    with_, without = (
        [row for row in answers if shows(row["response"]) == shown][:count]
        for shown in (True, False)
    )
    return (
        write_rows(folder / "with.jsonl", with_),
        write_rows(folder / "without.jsonl", without),
    )


def shared(*parts: str) -> Path:
    """A place in the folder `shared` beside the checkout, where there is one."""
    return ROOT.parent.joinpath("shared", *parts)


def as_adapter(run: Path, iteration: int, folder: Path) -> Path:
    """A training run's checkpoint as an adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "adapter_config.json", folder / "adapter_config.json")
    with files.atomic_path(folder / "adapters.safetensors") as path:
        shutil.copyfile(run / f"{iteration:07d}_adapters.safetensors", path)
    return folder


def goes_on(folder: Path, state: str = "checkpoint/state.safetensors") -> dict[str, bool]:
    """`RunFolder.going_on`; state: the place of the checkpoint in the folder."""
    return RunFolder(folder, Path(state), "").going_on()


SAE = shared("sae", "smollm2-135m-instruct-l27-4k-topk")


def study_parser(doc: str | None, work: str) -> argparse.ArgumentParser:
    """The options that every study of steps has; `work` is the folder of what is finished."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct, if not given")
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--data", type=Path, default=shared("data"))
    parser.add_argument("--work", type=Path, default=ROOT / work)
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def settings_of(o: argparse.Namespace, *more: str) -> dict[str, str]:
    """What two runs of a study must share; more: options that add to what is there, as seeds do."""
    apart = ("work", "output", "seeds", "seed", *more)
    return {k: str(v) for k, v in vars(o).items() if k not in apart}


def begin(o: argparse.Namespace, *more: str) -> tuple[str, Steps]:
    """The folder of the model, and the steps of this study; more: see `settings_of`."""
    steps = Steps(o.work, settings_of(o, *more))
    return str(o.model or smollm2.fetch(say=say).full), steps


def gains(pair: Mapping[str, Any]) -> tuple[float, float]:
    """What chosen and rejected gained on the reference, nats per token; a pair of `evaluate`."""
    chosen, rejected = (
        (side["logp"] - side["ref_logp"]) / side["tokens"]
        for side in (pair["chosen"], pair["rejected"])
    )
    return chosen, rejected


class Steps:
    """Runs each named step once; its result outlives a killed process.

    made.jsonl says which commit each was made by: a study may outlive many.
    """

    def __init__(self, work: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = work / "steps", settings
        known = self.folder / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            raise SystemExit(f"{work} was begun with other settings; name another folder.")
        files.write_json(known, settings)

    def done(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()

    def values(self) -> dict[str, Any]:
        """Every result that is there, by its step's name."""
        there = files.listed(self.folder, "*.json")
        return {p.stem: json.loads(p.read_text()) for p in there if p.name != "settings.json"}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.json"
        if self.done(name):
            return json.loads(path.read_text())
        say(f"--- {name}")
        start, commit = time.perf_counter(), commit_of(ROOT)
        value = run()
        files.write_json(path, value)
        made = {"step": name, "commit": commit, "seconds": round(time.perf_counter() - start)}
        with (self.folder / "made.jsonl").open("a") as known:  # by several processes: one write
            known.write(json.dumps(made) + "\n")
        say(f"--- {name}: {made['seconds']} s")
        return value


def commit_of(folder: Path) -> str | None:
    """The checkout's commit, with a + where package or scripts were changed since."""

    def git(*words: str) -> str:
        asked = ["git", "-C", str(folder), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fpo_mlx/*.py", "scripts/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def in_time(
    minutes: float | None, things: Iterable[T], name: Callable[[T], str] | None = None
) -> Iterator[T]:
    """The things to begin until so many minutes after this call; name: says where it stopped."""
    begun = time.monotonic()

    def each() -> Iterator[T]:
        for thing in things:
            if minutes is not None and time.monotonic() - begun >= 60 * minutes:
                if name:
                    say(f"stopped before {name(thing)}; the same command goes on")
                return
            yield thing

    return each()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
