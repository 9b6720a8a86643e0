"""Which model and which chat template an adapter says that it was made for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fpo_mlx.reference.weights import model_fingerprint
from fpo_mlx.storage.adapter_files import RUN, model_template, own_template, run_of
from fpo_mlx.storage.files import read_object

Say = Callable[[str], None]


def warn_of_origin(
    adapters: Iterable[str | Path | None],
    model: str,
    path: Path,
    template: str | None,
    say: Say,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Name every adapter that was made for another model than the one in the folder `path`, with
    another chat template than the model's where no `template` is given, or with other `arguments`
    of the template.

    Our own runs kept the model's fingerprint; of others only the name is known. arguments: None
    where nothing is asked with the template.
    """
    fingerprint = cache(model_fingerprint)  # reads every byte of the weights
    for adapter in adapters:
        if adapter is None:
            continue
        folder = Path(adapter).expanduser()
        own = _read(folder / "adapter_config.json")
        name = own.get("model") or own.get("base_model_name_or_path")
        run = _read(run_of(folder) / RUN)
        print_of = _part(run, "fingerprints").get("model")
        if isinstance(print_of, str):
            other = print_of != fingerprint(path)
        else:
            other = isinstance(name, str) and bool(name) and _last(name) != _last(model)
        if other:
            say(
                f"warning: the adapter {adapter} was made for another model "
                f"({name if isinstance(name, str) and name else 'its name is not kept'}) than "
                f"--model {model}; where the shapes happen to fit, its answers mean nothing"
            )
        given = _part(run, "settings").get("chat_template_args")
        if arguments is not None and isinstance(given, dict) and given != dict(arguments):
            theirs, ours = json.dumps(given), json.dumps(dict(arguments))
            say(
                f"warning: the adapter {adapter} was trained with --chat-template-args {theirs} "
                f"and is asked with {ours}; give '{theirs}' to ask as in training"
            )
        theirs = own_template(folder)
        if theirs is None or template:
            continue
        if theirs.read_text(encoding="utf-8", errors="replace") != model_template(path):
            say(
                f"warning: the adapter {adapter} was trained with another chat template than the "
                f"model's, with which it is asked; --chat-template {theirs} asks as in training"
            )


def _part(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = run.get(name)
    return found if isinstance(found, dict) else {}


def _last(name: str) -> str:
    """The name of a model without its owner, folder, revision and quantisation."""
    last = name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].partition("@")[0].lower()
    for end in ("-mlx", "-4bit", "-8bit", "-6bit", "-3bit", "-bf16", "-fp16"):
        last = last.removesuffix(end)
    return last


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
