"""Which model and which chat template an adapter says that it was made for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fpo_mlx.reference.weights import model_fingerprint
from fpo_mlx.storage.adapter_files import model_template, own_template

Say = Callable[[str], None]


def warn_of_origin(
    adapters: Iterable[str | Path | None], model: str, path: Path, template: str | None, say: Say
) -> None:
    """Name every adapter that was made for another model than the one in the folder `path`, or
    with another chat template than the model's where no `template` is given.

    Our own runs kept the model's fingerprint; of others only the name is known.
    """
    for adapter in adapters:
        if adapter is None:
            continue
        folder = Path(adapter).expanduser()
        own = _read(folder / "adapter_config.json")
        name = own.get("model") or own.get("base_model_name_or_path")
        kept = _read(folder / "run.json").get("fingerprints")
        print_of = kept.get("model") if isinstance(kept, dict) else None
        if isinstance(print_of, str):
            other = print_of != model_fingerprint(path)
        else:
            other = isinstance(name, str) and bool(name) and _last(name) != _last(model)
        if other:
            say(
                f"warning: the adapter {adapter} was made for another model "
                f"({name if isinstance(name, str) and name else 'its name is not kept'}) than "
                f"--model {model}; where the shapes happen to fit, its answers mean nothing"
            )
        theirs = own_template(folder)
        if theirs is None or template:
            continue
        if theirs.read_text(encoding="utf-8", errors="replace") != model_template(path):
            say(
                f"warning: the adapter {adapter} was trained with another chat template than the "
                f"model's, with which it is asked; --chat-template {theirs} asks as in training"
            )


def _last(name: str) -> str:
    """The name of a model without its owner, folder, revision and quantisation."""
    last = name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].partition("@")[0].lower()
    for end in ("-mlx", "-4bit", "-8bit", "-6bit", "-3bit", "-bf16", "-fp16"):
        last = last.removesuffix(end)
    return last


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
