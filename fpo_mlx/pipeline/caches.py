"""A finished reference cache: look at it, verify it, merge parts, export it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fpo_mlx import cache
from fpo_mlx.cache import MergeReport, VerifyReport
from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.pipeline.job import Say, open_job, read_pairs, splits_of
from fpo_mlx.pipeline.store import as_kept, open_engine
from fpo_mlx.records import PairScore, ResponseScore, TokenPair
from fpo_mlx.reference import weights
from fpo_mlx.storage import paths
from fpo_mlx.storage.headers import has_weights
from fpo_mlx.storage.hub import at_hand
from fpo_mlx.storage.outputs import refuse_inputs


def cache_info(folder: Path) -> dict[str, Any]:
    """What a cache was made of and holds, as plain values; reads every shard."""
    about = cache.info(folder)
    return {
        "folder": str(about.folder),
        "digest": about.identity.digest(),
        **about.identity.to_json(),
        **vars(about.made),
        **{k: v for k, v in asdict(about).items() if k not in ("folder", "identity", "made")},
    }


TOLERANCE, HALF_TOLERANCE = 0.01, 0.05  # relative; a healthy half-precision cache reached 0.028


def cache_verify(
    config: RunConfig,
    folder: Path,
    *,
    adapter: str | None,
    backend: str,
    device: str | None,
    sample: int,
    tolerance: float | None,
    say: Say,
) -> VerifyReport:
    """Score a sample of the data's pairs anew. Raises FpoError when they differ from the cache.

    tolerance: default `TOLERANCE`, or `HALF_TOLERANCE` where either side is in half precision.
    """
    job = open_job(config, adapter=adapter, say=say, backend=backend, device=device, projected=True)
    identity = as_kept(folder, job, say)
    store = cache.open_cache(folder, identity)
    pairs = [pair for name in splits_of(job) for pair in read_pairs(job, name, say)]
    engine = open_engine(job, say=say)

    def score(group: Sequence[TokenPair]) -> list[PairScore]:
        keep = identity.pooled_keep
        return [(_kept(a, keep), _kept(b, keep)) for a, b in engine.score(group)]

    report = cache.verify_rows(store, pairs, score, sample=sample)
    if tolerance is None:
        half = store.half or engine.dtype != "float32"
        tolerance = HALF_TOLERANCE if half else TOLERANCE
    largest = max(report.logp_relative, report.feature_relative)
    if not largest <= tolerance:
        raise FpoError(
            f"{folder} differs from what this model gives now: log-probs by "
            f"{report.logp_relative:.2g}, features by {report.feature_relative:.2g} (relative), "
            f"worst in {report.worst}; wanted at most {tolerance:g}. Run `fpo-mlx precompute` into "
            "a new folder, or raise --tolerance if the other backend's rounding explains it."
        )
    return report


def _kept(score: ResponseScore, keep: int | None) -> ResponseScore:
    """The score as a cache that keeps so many features would hold it."""
    features = tuple(cache.keep_largest(pooled, keep)[0] for pooled in score.features)
    return replace(score, features=features)


def cache_merge(parts: Sequence[Path], output: Path) -> MergeReport:
    """Join parts of one precompute setting. Raises ConfigError when there is nothing to join."""
    if not parts:
        raise ConfigError("cache merge: name the folders to merge.")
    refuse_inputs(output, "--output", parts)
    return cache.merge(parts, output)


def cache_export(folder: Path, output: Path) -> int:
    """The rows as JSON lines; their number."""
    return cache.export(folder, output)


def cache_list(root: Path | None) -> list[cache.Entry]:
    """The caches below a folder (default: the user's own), the oldest first."""
    return cache.list_caches(root or paths.cache_root() / "reference")


LEAST_DIGITS = 6  # of a fingerprint: fewer may be another model's, too


def cache_select(
    root: Path | None, *, older_than: float | None, larger_than: float | None, model: str | None
) -> list[cache.Entry]:
    """Those to prune. model: a folder, a hub id, or the beginning of a fingerprint.

    Raises: ConfigError without any condition.
    """
    if older_than is None and larger_than is None and model is None:
        raise ConfigError(
            "cache prune: say which caches: --older-than DAYS, --larger-than MB or --model. "
            "`--older-than 0` means all."
        )
    if model is not None and not model.strip():
        raise ConfigError("--model is empty. Wanted a model's folder or a fingerprint's start.")
    there = at_hand(model) if model is not None else None
    if there is not None and has_weights(there):
        model = weights.model_fingerprint(there)
    elif model is not None and not re.fullmatch(f"[0-9a-f]{{{LEAST_DIGITS},}}", model):
        raise ConfigError(
            f"--model {model}: found no such model with its weights on this disk. Wanted its "
            f"folder, its hub id, or {LEAST_DIGITS} digits or more of the fingerprint that "
            "`cache list` shows."
        )
    entries = cache_list(root)
    return cache.select(entries, older_than=older_than, larger_than=larger_than, model=model)


def cache_remove(folder: Path) -> int:
    """Bytes that were freed."""
    return cache.remove(folder)
