"""Which model, which chat template and which pairs an adapter says that it was made with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fpo_mlx.config import DataConfig, RunConfig
from fpo_mlx.data import data_fingerprint, find_splits
from fpo_mlx.errors import FpoError
from fpo_mlx.intervals import share_to_hold
from fpo_mlx.pipeline.prepared import hub_splits
from fpo_mlx.records import TokenPair
from fpo_mlx.reference.weights import model_fingerprint
from fpo_mlx.sae.names import plain
from fpo_mlx.storage.adapter_files import (
    RUN,
    model_template,
    own_template,
    read_adapter,
    run_of,
)
from fpo_mlx.storage.files import known_object
from fpo_mlx.storage.outputs import same_place

Say = Callable[[str], None]
PARTS = {"subset": "default", "train_split": "train"}  # of a data set, and what none means


def warn_of_origin(
    adapters: Iterable[str | Path | None],
    model: str,
    path: Path,
    template: str | None,
    say: Say,
    arguments: Mapping[str, Any] | None = None,
    known: str | None = None,
) -> None:
    """Name every adapter that was made for another model than the one in the folder `path`, with
    another chat template than the model's where no `template` is given, with other `arguments` of
    the template, or with layers that are none of the text's.

    Our own runs kept the model's fingerprint; of others only the name is known. arguments: None
    where nothing is asked with the template. known: the model's fingerprint, where it was made.
    """

    @cache
    def fingerprint() -> str:
        return known or model_fingerprint(path)  # reads every byte of the weights

    for adapter in adapters:
        if adapter is None:
            continue
        folder = Path(adapter).expanduser()
        run = _run(folder)
        for warning in (
            _of_model(folder, run, model, fingerprint),
            None if arguments is None else _of_variables(run, arguments),
            None if template else _of_template(folder, path),
            _of_towers(folder),
        ):
            if warning:
                say(f"warning: the adapter {adapter} was {warning}")


def warn_of_training_pairs(
    adapters: Iterable[str | Path],
    pairs: Sequence[TokenPair],
    say: Say,
    config: RunConfig,
    split: str,
    *,
    way: str = " --split valid",
) -> set[str]:
    """Name every adapter whose run.json says that it was trained on these very pairs, or on pairs
    among these, as a smaller --valid-share held fewer of the same data back; those.

    config, split: of which the pairs are. way: beside the share, to what was held back.
    """
    ours, found = data_fingerprint(pairs), set()
    apart = replace(hub_splits(config), valid_share=0.0)
    # a split of its own that no share touches
    own = split != "train" and split in find_splits(config.data.data, apart)
    for adapter in dict.fromkeys(map(str, adapters)):
        run = _run(Path(adapter).expanduser())
        if _part(run, "fingerprints").get("data") == ours:
            found.add(adapter)
            say(
                f"warning: the adapter {adapter} was trained on these very pairs, so that its "
                "figures say little of others. Hold some back: --valid-share "
                f"{share_to_hold(len(pairs)):g} in training and here, or a folder with "
                "train.jsonl and valid.jsonl as --data"
            )
        elif not own and (theirs := _smaller_share(run, config.data)) is not None:
            found.add(adapter)
            say(f"warning: the adapter {adapter} {_seen(theirs, config.data.valid_share, way)}")
    return found


def _seen(theirs: float, ours: float, way: str) -> str:
    much = "most" if theirs < ours / 2 or not ours else "some"
    if not theirs:
        return (
            "was trained on this data with nothing held back: it has seen most of these pairs; "
            f"train anew with --valid-share {ours:g} to have pairs to judge on"
        )
    return (
        f"was trained on this data with --valid-share {theirs:g}, and this is --valid-share "
        f"{ours:g}: it has seen {much} of these pairs. Give "
        f"--valid-share {theirs:g}{way} here, too"
    )


def _smaller_share(run: Mapping[str, Any], ours: DataConfig) -> float | None:
    """What a run on the same data held back, where these pairs are more than that.

    Prompts that a smaller share holds back are among those of a larger one.
    """
    settings, place = _part(run, "settings"), Path(ours.data).expanduser()
    kept = _part(run, "source").get("data") if place.exists() else settings.get("data")
    same = same_place(Path(str(kept)), place) if place.exists() else kept == ours.data
    same = same and all(
        _may_overlap(settings.get(name) or none, getattr(ours, name) or none)
        for name, none in PARTS.items()
    )
    theirs = settings.get("valid_share") or 0.0
    more = theirs < ours.valid_share or (theirs and not ours.valid_share)
    return theirs if same and more else None


def _may_overlap(one: str, other: str) -> bool:
    """Whether two subsets or splits are one, or one of them a slice of the other."""
    sliced = "[" in one and "[" in other
    return one == other or (not sliced and one.split("[")[0] == other.split("[")[0])


def settings_of(adapter: str | Path) -> Mapping[str, Any]:
    """The settings of the training that made an adapter, by its run.json; empty without one."""
    return _part(_run(Path(adapter).expanduser()), "settings")


def start_of(adapter: str | Path) -> str | None:
    """The adapter that this one's training began from, by its run.json."""
    found = settings_of(adapter).get("init_adapter")
    return found if isinstance(found, str) and found else None


def warn_of_start(adapters: Iterable[str | Path], given: str | None, say: Say) -> None:
    """Name every adapter that began from another one where no --init-adapter is `given`."""
    for adapter in dict.fromkeys(map(str, adapters)):
        if not given and (start := start_of(adapter)):
            say(
                f"warning: the adapter {adapter} began from the adapter {start}, by its run.json, "
                "and is compared with the plain model here: what that one changed is in the "
                "figures, too. To compare with where the training began, give "
                f"--init-adapter {shlex.quote(start)}"
            )


def _run(adapter: Path) -> Mapping[str, Any]:
    return known_object(run_of(adapter) / RUN)


def _of_model(
    folder: Path, run: Mapping[str, Any], model: str, fingerprint: Callable[[], str]
) -> str | None:
    own = known_object(folder / "adapter_config.json")
    name = own.get("model") or own.get("base_model_name_or_path")
    name = name if isinstance(name, str) else ""
    known = _part(run, "fingerprints").get("model")
    if isinstance(known, str):
        other = known != fingerprint()
    else:
        other = bool(name) and plain(name) != plain(model)
    if not other:
        return None
    if name and plain(name) == plain(model):
        return (
            f"made on other weights of that name ({name}) than --model {model}: with another "
            "quantisation or revision of one model it does about the same, with another model "
            "its answers mean nothing"
        )
    return (
        f"made for another model ({name or 'its name is not kept'}) than --model {model}; where "
        "the shapes happen to fit, its answers mean nothing"
    )


def _of_variables(run: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    theirs = _part(run, "settings").get("chat_template_args")
    if not isinstance(theirs, dict) or theirs == dict(ours):
        return None
    return (
        f"trained with --chat-template-args {json.dumps(theirs)} and is asked with "
        f"{json.dumps(dict(ours))}; give '{json.dumps(theirs)}' to ask as in training"
    )


def _of_template(folder: Path, model: Path) -> str | None:
    theirs = own_template(folder)
    if theirs is None:
        return None
    if theirs.read_text(encoding="utf-8", errors="replace") == model_template(model):
        return None
    return (
        "trained with another chat template than the model's, with which it is asked; "
        f"--chat-template {theirs} asks as in training"
    )


def _of_towers(folder: Path) -> str | None:
    try:
        left_out = read_adapter(folder).left_out
    except FpoError:  # said where it is loaded
        return None
    if not left_out:
        return None
    return (
        f"trained with {len(left_out)} layers of vision or audio, too ({left_out[0]}, …): text "
        "never meets them, and they are left out"
    )


def _part(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = run.get(name)
    return found if isinstance(found, dict) else {}
