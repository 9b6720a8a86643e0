"""Fuse adapters into a model folder, and compare before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.evaluate import check_scales, open_scorer
from fpo_mlx.pipeline.job import Job, Say, has_split, open_job, read_pairs
from fpo_mlx.pipeline.store import CachedScores, default_cache, fill_cache
from fpo_mlx.records import AS_BASE, FusedForm
from fpo_mlx.storage.hub import resolve_model
from fpo_mlx.storage.outputs import MODEL, Made, claim_folder

if TYPE_CHECKING:
    from fpo_mlx.model.fuse import FuseReport
    from fpo_mlx.train.metrics import ScoredPairs

TOLERABLE = 0.2  # error of the rounding over the size of the change


@dataclass(frozen=True)
class Bound:
    """How far the fused model may be from the base on held-out pairs.

    value: nats per rejected answer, or a drift r of the SAE's features (docs/objective.md).
    """

    kind: Literal["kl", "drift"]
    value: float

    @property
    def flag(self) -> str:
        return f"--target-{self.kind}"

    def read(self, summary: Mapping[str, Any]) -> float:
        measured = float(summary[f"{self.kind}/rejected"])
        return measured if self.kind == "kl" else math.sqrt(measured)  # drifts are squares there

    def said(self, part: float, found: float) -> str:
        what = f"KL {found:.3g} nats per rejected answer"
        if self.kind == "drift":
            what = f"drift {found:.3g}"
        return f"--adapter-scale {part:.4g}: {what}, within {self.value:g}"


@dataclass(frozen=True)
class FuseResult:
    """scale: part of the adapter that was taken; within: the bound it was found for, as measured"""

    report: Any
    scale: float = 1.0
    within: Bound | None = None
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None


def fuse(
    config: RunConfig,
    form: FusedForm = AS_BASE,
    *,
    adapter_path: str,
    save_path: Path,
    bound: Bound | None = None,
    upload_repo: str | None = None,
    verify: str | None = None,
    overwrite: bool = False,
    say: Say,
) -> FuseResult:
    """Fuse adapters into a model folder; `verify` names data to compare before and after on.

    bound: in place of `form.scale`, the largest part of the adapter that is within it on those
    pairs. Raises: ConfigError, also where a bound lacks what it is measured with.
    """
    from fpo_mlx.model import fuse as fusing

    if not config.reference.model:
        raise ConfigError("--model is missing. Wanted the model that the adapter was trained on.")

    def claim(*more: str | Path | None) -> Path:
        inputs = [*config.reads(), adapter_path, verify, *more]
        made = _made(form)
        return claim_folder(save_path, "--save-path", made, inputs=inputs, overwrite=overwrite)

    if bound is not None or form.scale != 1.0:
        check_scales(config, [adapter_path], [form.scale])
    if bound is not None:
        _check_bound(config, bound, verify, form.scale)
    save_path = claim()  # before a download
    base = resolve_model(config.reference.model)
    claim(base)
    within = None
    if bound is not None and verify:
        scale, found = _scale_within(config, adapter_path, verify, bound, say)
        form, within = replace(form, scale=scale), replace(bound, value=found)
    template = config.data.chat_template
    report = fusing.fuse(
        config.reference.model, Path(adapter_path), save_path, form,
        chat_template=Path(template) if template else None,
        upload_repo=None if verify else upload_repo,
        trust_remote_code=config.reference.trust_remote_code, check=partial(claim, base),
    )  # fmt: skip
    for line in said_of(report):
        say(line)
    if not verify:
        return FuseResult(report, form.scale)
    before, after = _compare_fused(config, adapter_path, form.scale, save_path, verify, say)
    if upload_repo:
        fusing.upload(save_path, upload_repo)
    return FuseResult(replace(report, uploaded=upload_repo), form.scale, within, before, after)


def _made(form: FusedForm) -> Made:
    """The files of a fused folder, with the GGUF's name if there is one."""
    if form.gguf_path is None:
        return MODEL
    return replace(MODEL, names=f"{MODEL.names}|{re.escape(form.gguf_path)}")


def said_of(report: FuseReport) -> list[str]:
    """What a user should know of a fused folder: its template, and what rounding took."""
    lines = []
    if report.template:
        lines.append(f"the folder has {report.template}, not the base's")
    if (kept := report.kept) is not None:
        bits = " and ".join(map(str, kept.bits))
        more = "" if max(kept.bits) > 8 else "--keep-bits 8 keeps the adapted layers at 8 bits, "
        whole = "" if kept.bits == (16,) else "--dequantize "
        way = "" if kept.error < TOLERABLE else f"; {more}{whole}--dtype float32 keeps all of it"
        lines.append(
            f"rounding to {bits} bits left {kept.share:.0%} of the adapters' change, with an error "
            f"{kept.error:.2f} times its size{way}"
        )
    if report.unreached:
        lines.append(
            f"--keep-bits does not reach {report.unreached} adapted embeddings or blocks of "
            "experts: they have the base's bits"
        )
    return lines


def _check_bound(config: RunConfig, bound: Bound, verify: str | None, scale: float) -> None:
    """Before anything is read. Raises: ConfigError where it cannot be measured."""
    if verify is None:
        raise ConfigError(f"{bound.flag}: found no pairs to measure on. Add --verify DATA.")
    if scale != 1.0 or not (bound.value > 0 and math.isfinite(bound.value)):
        wanted = "a KL" if bound.kind == "kl" else "a drift"
        raise ConfigError(
            f"{bound.flag} {bound.value:g}: wanted {wanted} above 0, and no --adapter-scale "
            "beside it."
        )
    if bound.kind == "drift" and not config.reference.sae:
        raise ConfigError(
            f"{bound.flag} {bound.value:g}: the features of an SAE are what drifts. Add the --sae "
            "of the training."
        )


def _scale_within(
    config: RunConfig, adapter_path: str, verify: str, bound: Bound, say: Say
) -> tuple[float, float]:
    """(part, its KL or drift): bisection over the parts, each judged on the pairs of `verify`."""
    from fpo_mlx.judge import evaluate as evaluation
    from fpo_mlx.judge.frontier import largest_scale
    from fpo_mlx.model import adapters

    job, scored = _held_out(config, verify, say, saes=bound.kind == "drift")
    scorer = open_scorer(job, adapter_path, measure_kl=bound.kind == "kl", say=say)
    whole, fresh = Path(adapter_path), scorer.reference_weights()

    def measured(part: float) -> float:
        adapters.update(scorer.policy.model, fresh)
        adapters.fill(scorer.policy.model, whole, scale=part)
        return bound.read(evaluation.evaluate(scorer, scored).summary)

    part, found = largest_scale(measured, bound.value)
    say(bound.said(part, found))
    return part, found


def _held_out(
    config: RunConfig, verify: str, say: Say, *, saes: bool = False
) -> tuple[Job, ScoredPairs]:
    """The pairs of `verify` with the scores of the base. saes: with features, for a drift."""
    from fpo_mlx.train.metrics import ScoredPairs

    config = replace(config, data=replace(config.data, data=verify))
    if not saes:
        config = replace(config, objective=replace(config.objective, constraint="none"))
    job = open_job(config, say=say)
    split = next((s for s in ("test", "valid", "train") if has_split(job, s)), "test")
    pairs = read_pairs(job, split, say)
    store = fill_cache(job, pairs, folder=default_cache(job.identity), say=say)
    return job, ScoredPairs(pairs, CachedScores(store, pairs))


def _compare_fused(
    config: RunConfig, adapter_path: str, scale: float, fused: Path, verify: str, say: Say
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy and margin of base + adapter and of the fused folder, against one reference."""
    from fpo_mlx.judge import evaluate as evaluation

    job, scored = _held_out(config, verify, say)
    results = []
    for path, adapter in ((job.model_path, adapter_path), (fused, None)):
        scorer = open_scorer(job, adapter, scale=scale, model=path, measure_kl=False, say=say)
        summary = evaluation.evaluate(scorer, scored).summary
        names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
        results.append({name: float(summary[name]) for name in names})
        del scorer
    return results[0], results[1]
