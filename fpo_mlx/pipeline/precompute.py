"""Run the frozen reference over the data, once."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from fpo_mlx import cache
from fpo_mlx.config import RunConfig
from fpo_mlx.machine import device as machine
from fpo_mlx.machine.processes import find_share
from fpo_mlx.pipeline.job import Say, open_job, splits_of
from fpo_mlx.pipeline.prepared import read_splits
from fpo_mlx.pipeline.store import OnFill, check_keep, default_cache, fill_cache
from fpo_mlx.storage.outputs import refuse_inputs


@dataclass(frozen=True)
class PrecomputeResult:
    """left_out: for each SAE the largest feature that was not kept, and the share of the squares
    that was not (zeros when everything is kept)."""

    path: Path
    pairs: int
    rows: int
    backend: str
    left_out: tuple[tuple[float, float], ...] = ()


def precompute(
    config: RunConfig,
    *,
    output: Path | None,
    adapter: str | None = None,
    backend: str = "mlx",
    device: str | None = None,
    split: str = "all",
    keep_features: int | None = None,
    say: Say,
    progress: OnFill = lambda _: None,
) -> PrecomputeResult:
    """Score every pair of the data with the frozen reference, once.

    keep_features: store only so many of the largest pooled features of a response.
    """
    if keep_features is not None:
        check_keep(keep_features, config.objective.top_k, f"--keep-features {keep_features}")
    if output is not None:  # a cache of ours grows; one among other files is refused on opening
        inputs = [*config.reads("reference"), adapter or config.train.init_adapter]
        refuse_inputs(output, "--output", inputs)
    job = open_job(config, adapter=adapter, say=say, backend=backend, device=device, projected=True)
    job = replace(job, identity=replace(job.identity, pooled_keep=keep_features))
    names = splits_of(job) if split == "all" else (split,)
    splits = read_splits(config, job.tokenizer, names, say, doctor=True)
    pairs = [pair for name in names for pair in splits[name]]
    folder = output or default_cache(job.identity)
    share = config.reference.wired_share if backend == "mlx" else 0.0
    with machine.resident(share, find_share(os.environ).world):
        store = fill_cache(job, pairs, folder=folder, say=say, progress=progress)
    left_out = ()
    if keep_features is not None:
        about = cache.info(folder)
        left_out = tuple(zip(about.dropped_largest, about.dropped_share, strict=True))
        if output is None:
            say(
                "a cache of fewer features is not the one that `train` looks for: give it "
                f"--reference {folder}"
            )
    return PrecomputeResult(folder, len(pairs), len(store), backend, left_out)
