"""What the runs of a report are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as much of the path before them as tells them apart."""
    full = [path.resolve() for path in paths]
    depth = 1
    while depth < 8:
        names = ["/".join(path.parts[-depth:]) for path in full]
        if len(set(names)) == len(set(full)):
            break
        depth += 1
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]
