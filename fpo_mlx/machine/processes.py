"""Which of how many processes this one is, as launchers tell it in the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fpo_mlx.errors import ConfigError


class Share(NamedTuple):
    """Process `rank` (from 0) of `world`."""

    rank: int = 0
    world: int = 1


def find_share(environment: Mapping[str, str]) -> Share:
    """From torchrun or accelerate, mlx.launch (ring, jaccl, nccl) or MPI; alone without one.

    Raises ConfigError when the variables make no sense.
    """
    names = [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")]
    try:
        if "MLX_RANK" in environment:
            share = Share(int(environment["MLX_RANK"]), _mlx_world(environment))
        else:
            found = [(r, w) for r, w in names if r in environment and w in environment]
            share = Share(*(int(environment[name]) for name in found[0])) if found else Share()
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"The launcher's variables for rank and number of processes cannot be read ({error}). "
            "Start with torchrun or mlx.launch, or unset RANK, WORLD_SIZE and MLX_RANK."
        ) from error
    if not 0 <= share.rank < share.world:
        raise ConfigError(
            f"The launcher says rank {share.rank} of {share.world} processes; wanted a rank below "
            "their number. Start with torchrun or mlx.launch, or unset RANK and WORLD_SIZE."
        )
    return share


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks and writes for all: rank 0, or alone."""
    try:
        return find_share(environment).rank == 0
    except ConfigError:  # said where the share is needed
        return True


def _mlx_world(environment: Mapping[str, str]) -> int:
    if "MLX_WORLD_SIZE" in environment:
        return int(environment["MLX_WORLD_SIZE"])
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):  # a JSON list with one entry for each rank
        if name in environment:
            text = Path(environment[name]).read_text(encoding="utf-8")
            return len(json.loads(text)) if text.strip() else 1  # mlx.launch -n 1 writes nothing
    return 1
