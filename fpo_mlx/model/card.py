"""What goes with a model's weights wherever they go: its base's files, licence and card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from fpo_mlx.storage import files

CARD, LICENCE = "README.md", ("license", "license_name", "license_link")


def copy_beside(folder: Path, base: Path, patterns: Iterable[str]) -> None:
    """Files of the base that the folder lacks."""
    for pattern in patterns:
        for file in files.listed(base, pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def put(folder: Path, base: Path, named: str | None) -> None:
    """mlx-lm's card, with what whoever publishes the folder owes: the base, and its licence."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import metadata_load
    from mlx_lm import utils

    utils.create_model_card(folder, None)
    card = ModelCard.load(folder / CARD)
    try:
        theirs = (metadata_load(base / CARD) if (base / CARD).is_file() else None) or {}
    except Exception:  # somebody's text, and YAML has errors of its own
        theirs = {}
    for name in LICENCE:
        if theirs.get(name):
            card.data[name] = theirs[name]
    if named:
        card.data["base_model"] = named
    card.save(folder / CARD)
