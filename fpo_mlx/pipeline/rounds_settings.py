"""The settings that rounds were begun with: what may be another one when they are gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fpo_mlx.config import named
from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.settings import RoundsConfig
from fpo_mlx.pipeline.job import Say
from fpo_mlx.records import ROUND_FILE
from fpo_mlx.storage import files, outputs

ROUNDS = outputs.Made("rounds", r"round-\d+/|settings\.json", mark="settings.json")
ANY = ("round-*/*.jsonl",)
PLACES = ("model", "prompts", "held_out", "output")
MADE_WITH = {  # what each setting has a part in; ANY of those that are not here
    "prompts": ("round-*/candidates.jsonl",),
    "judge": ("round-*/*verdicts.jsonl",),
    "build": ("round-*/pairs",),
    "keep_old": ("round-*/data", "round-*/adapters/checkpoint"),
    # before it has a state, a run begins anew
    "train": ("round-*/adapters/checkpoint/state.safetensors", f"round-*/{ROUND_FILE}"),
    "max_drift": (f"round-*/{ROUND_FILE}",),
}


def same_settings(root: Path, settings: RoundsConfig, say: Say) -> None:
    """What was made with other settings is not gone on with; more rounds may be asked for.

    Of `train` that holds for what a resumed run may not change, or nothing would get past a guard.
    """
    now, path = {**asdict(settings), "rounds": None}, root / "settings.json"
    if path.exists():
        before = files.parse_json(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(now))
        was = before if isinstance(before, dict) else {}
        changed = [k for k in {**now, **was} if k not in was or not _alike(k, was[k], now.get(k))]
        if any(_is_made(root, name) for name in changed):
            raise ConfigError(
                f"{root} was begun with other settings ({', '.join(changed)}). Name another "
                "output, or give the settings it was begun with."
            )
        if was.get("train") != now["train"] and _is_made(root, "train"):
            say("train has other settings now; a round that is done stays as it is")
        if now != was:
            files.write_json(path, now)
    else:
        inputs = (settings.model, settings.prompts, settings.held_out)
        outputs.claim_folder(root, "output", ROUNDS, inputs=inputs)
        files.write_json(path, now)


def _is_made(root: Path, name: str) -> bool:
    """Whether there is anything that this setting had a part in; else it may still be mended."""
    there = (path for pattern in MADE_WITH.get(name, ANY) for path in files.listed(root, pattern))
    return any(path.is_dir() or path.stat().st_size for path in there)


def _alike(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same: of places on disk, one thing however it is
    spelled; of `train`, without what its --resume takes, of `build` without what makes no pair."""
    if name in PLACES and len(found := outputs.existing([one, other])) == 2:
        return outputs.same_place(*found)
    if name in ("build", "train") and isinstance(one, Mapping) and isinstance(other, Mapping):
        resumed = {*named("may_change")} - {*named("path")}  # a file's content is not asked here
        free = {"force"} if name == "build" else resumed
        one, other = ({k: v for k, v in part.items() if k not in free} for part in (one, other))
    return one == other
