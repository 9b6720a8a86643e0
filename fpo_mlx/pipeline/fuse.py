"""Fuse adapters into a model folder, and compare before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.evaluate import open_scorer
from fpo_mlx.pipeline.job import Say, has_split, open_job, read_pairs
from fpo_mlx.pipeline.store import CachedScores, default_cache, fill_cache


@dataclass(frozen=True)
class FuseResult:
    report: Any
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None


def fuse(
    config: RunConfig,
    *,
    adapter_path: str,
    save_path: Path,
    dequantize: bool,
    dtype: str | None,
    gguf_path: str | None,
    upload_repo: str | None,
    verify: str | None,
    say: Say,
) -> FuseResult:
    """Fuse adapters into a model folder; `verify` names data to compare before and after on."""
    from fpo_mlx.model import fuse as fusing

    if not config.reference.model:
        raise ConfigError("--model is missing. Wanted the model that the adapter was trained on.")
    report = fusing.fuse(
        config.reference.model,
        Path(adapter_path),
        save_path,
        dequantize=dequantize,
        dtype=dtype,
        gguf_path=gguf_path,
        upload_repo=None if verify else upload_repo,
        trust_remote_code=config.reference.trust_remote_code,
    )
    if not verify:
        return FuseResult(report)
    before, after = _compare_fused(config, adapter_path, save_path, verify, say)
    if upload_repo:
        from mlx_lm.utils import upload_to_hub

        upload_to_hub(str(save_path), upload_repo)
    return FuseResult(replace(report, uploaded=upload_repo), before, after)


def _compare_fused(
    config: RunConfig, adapter_path: str, fused: Path, verify: str, say: Say
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy and margin of base + adapter and of the fused folder, against one reference."""
    from fpo_mlx.judge import evaluate as evaluation
    from fpo_mlx.train.metrics import ScoredPairs

    config = replace(
        config,
        data=replace(config.data, data=verify),
        objective=replace(config.objective, constraint="none"),
    )
    job = open_job(config, say=say)
    split = next((s for s in ("test", "valid", "train") if has_split(job, s)), "test")
    pairs = read_pairs(job, split, say)
    store = fill_cache(job, pairs, folder=default_cache(job.identity), say=say)
    scored = ScoredPairs(pairs, CachedScores(store, pairs))
    results = []
    for path, adapter in ((job.model_path, adapter_path), (fused, None)):
        scorer = open_scorer(job, adapter, model=path, measure_kl=False, say=say)
        summary = evaluation.evaluate(scorer, scored).summary
        names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
        results.append({name: float(summary[name]) for name in names})
        del scorer
    return results[0], results[1]
