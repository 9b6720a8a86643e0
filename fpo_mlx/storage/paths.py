"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$FPO_MLX_CACHE`, else `~/.cache/fpo-mlx`."""
    chosen = os.environ.get("FPO_MLX_CACHE")
    return Path(chosen).expanduser() if chosen else Path("~/.cache/fpo-mlx").expanduser()
