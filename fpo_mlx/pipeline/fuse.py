"""Fuse adapters into a model folder, and compare before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.evaluate import open_scorer
from fpo_mlx.pipeline.job import Say, has_split, open_job, read_pairs
from fpo_mlx.pipeline.store import CachedScores, default_cache, fill_cache
from fpo_mlx.storage.hub import resolve_model
from fpo_mlx.storage.outputs import MODEL, claim_folder

if TYPE_CHECKING:
    from fpo_mlx.model.fuse import FuseReport

TOLERABLE = 0.2  # error of the rounding over the size of the change


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
    keep_bits: int | None = None,
    dtype: str | None,
    gguf_path: str | None,
    upload_repo: str | None,
    verify: str | None,
    overwrite: bool = False,
    say: Say,
) -> FuseResult:
    """Fuse adapters into a model folder; `verify` names data to compare before and after on."""
    from fpo_mlx.model import fuse as fusing

    if not config.reference.model:
        raise ConfigError("--model is missing. Wanted the model that the adapter was trained on.")
    read = [*config.reads(), resolve_model(config.reference.model), adapter_path, verify]
    claim_folder(save_path, "--save-path", MODEL, inputs=read, overwrite=overwrite)
    report = fusing.fuse(
        config.reference.model,
        Path(adapter_path),
        save_path,
        dequantize=dequantize,
        keep_bits=keep_bits,
        dtype=dtype,
        gguf_path=gguf_path,
        chat_template=Path(template) if (template := config.data.chat_template) else None,
        upload_repo=None if verify else upload_repo,
        trust_remote_code=config.reference.trust_remote_code,
    )
    for line in said_of(report):
        say(line)
    if not verify:
        return FuseResult(report)
    before, after = _compare_fused(config, adapter_path, save_path, verify, say)
    if upload_repo:
        fusing.upload(save_path, upload_repo)
    return FuseResult(replace(report, uploaded=upload_repo), before, after)


def said_of(report: FuseReport) -> list[str]:
    """What a user should know of a fused folder: its template, and what rounding took."""
    lines = []
    if report.template:
        lines.append(f"the folder has {report.template}, not the base's")
    if (kept := report.kept) is not None:
        bits = " and ".join(map(str, kept.bits))
        way = (
            "" if kept.error < TOLERABLE
            else "; --keep-bits 8 keeps the adapted layers at 8 bits, --dequantize keeps all of it"
        )  # fmt: skip
        lines.append(
            f"rounding to {bits} bits left {kept.share:.0%} of the adapters' change, with an error "
            f"{kept.error:.2f} times its size{way}"
        )
    return lines


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
    job = open_job(config, adapter=None, say=say)
    split = next((s for s in ("test", "valid", "train") if has_split(job, s)), "test")
    pairs = read_pairs(job, split, say)
    store = fill_cache(job, pairs, folder=default_cache(job.identity), adapter=None, say=say)
    scored = ScoredPairs(pairs, CachedScores(store, pairs))
    results = []
    for path, adapter in ((job.model_path, adapter_path), (fused, None)):
        scorer = open_scorer(replace(job, model_path=path), adapter, measure_kl=False, say=say)
        summary = evaluation.evaluate(scorer, scored).summary
        names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
        results.append({name: float(summary[name]) for name in names})
        del scorer
    return results[0], results[1]
