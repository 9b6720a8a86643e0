"""One way to open a model: loaded, its adapter in it, nothing dropped, what was done said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fpo_mlx.model import adapters
from fpo_mlx.model.load import LoadedModel, load_model


def open_model(
    spec: str | Path,
    *,
    adapter: str | Path | None = None,
    scale: float = 1.0,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """A frozen model as it answers. spec: folder or hub id; adapter: folder of an adapter;
    scale: part of its change that is taken (`adapters.fill`).

    Raises: ModelError for a model or an adapter that cannot be read, or do not fit together.
    """
    loaded = load_model(spec, trust_remote_code=trust_remote_code)
    for note in loaded.notes:
        say(note)
    if adapter is not None:
        adapters.load(loaded.model, Path(adapter), scale=scale)
    return loaded
