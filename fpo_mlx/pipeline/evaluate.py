"""Judge base + adapter on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.config import RunConfig, Sampling
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import (
    Job,
    Say,
    open_job,
    read_pairs,
    warn_of_adapters,
)
from fpo_mlx.pipeline.measure import as_trained
from fpo_mlx.pipeline.origins import start_of, warn_of_start, warn_of_training_pairs
from fpo_mlx.pipeline.prepared import check_room
from fpo_mlx.pipeline.store import CachedScores, OnFill, reference_of
from fpo_mlx.records import TokenPair
from fpo_mlx.storage.adapter_files import read_adapter

if TYPE_CHECKING:
    import numpy as np

    from fpo_mlx.judge.evaluate import EvalReport, EvalTable
    from fpo_mlx.train.scoring import Scorer


def evaluate(
    config: RunConfig,
    *,
    adapter_path: str | None,
    split: str = "test",
    measure_kl: bool = True,
    say: Say,
    progress: OnFill = lambda _: None,
) -> EvalReport:
    """Score a split under base + adapter against the reference. Features if an SAE is given."""
    table = evaluate_all(
        config, adapter_paths=[adapter_path] if adapter_path else [], split=split,
        measure_kl=measure_kl, say=say, progress=progress,
    )  # fmt: skip
    return next(iter(table.adapters.values()))


def evaluate_all(
    config: RunConfig,
    *,
    adapter_paths: Sequence[str],
    scales: Sequence[float] = (1.0,),
    split: str = "test",
    measure_kl: bool = True,
    samples: int = 0,
    sampling: Sampling | None = None,
    say: Say,
    progress: OnFill = lambda _: None,
) -> EvalTable:
    """Score a split under each adapter, beside the reference; without adapters the base alone.

    Judged is by the objective of the training, where the settings name none (`as_trained`).

    scales: parts of each adapter's change to judge (`adapters.fill`), a column each.
    samples: prompts of the split to answer, for entropy and distinct-n; 0 for none.
    """
    from fpo_mlx.judge import evaluate as evaluation
    from fpo_mlx.train.metrics import ScoredPairs

    if scales != (1.0,):
        check_scales(config, adapter_paths, scales)
    digests = {p: read_adapter(Path(p)).digest for p in adapter_paths}  # before the long part
    config = as_trained(config, adapter_paths, say, measure_kl=measure_kl)
    job = open_job(config, say=say, need_sae=False)
    warn_of_adapters(adapter_paths, config, job.model_path, say, job.identity.model)
    warn_of_start(adapter_paths, config.train.init_adapter, say)
    pairs = read_pairs(job, split, say)
    seen: set[str] = set()
    if split != "train":
        seen = warn_of_training_pairs(adapter_paths, pairs, say, config, split)
    sampling = sampling or Sampling()
    asked = _asked(job, pairs, samples, sampling.max_tokens, say)  # before the long part
    store = reference_of(job, pairs, say, progress)
    data = ScoredPairs(pairs, CachedScores(store, pairs))
    reports: dict[str, EvalReport] = {}
    base: EvalReport | None = None
    judged = _scorers(job, adapter_paths, scales, half=store.half, measure_kl=measure_kl, say=say)
    for path, scale, scorer in judged:
        report = evaluation.evaluate(scorer, data)
        report = replace(
            report, adapter_scale=scale, trained_on=path in seen, adapter_sha256=digests.get(path)
        )
        if base is None and adapter_paths:
            base = evaluation.reference_report(data, report.summary)
            with scorer.as_reference():
                base = _with_answers(job, scorer, base, asked, sampling)
        name = evaluation.name_of(path, scale)
        reports[name] = _with_answers(job, scorer, report, asked, sampling)
        del scorer  # see _scorers
    o = config.objective
    settings = {"preset": config.preset, **asdict(o), "alpha": o.judged_alpha}
    return evaluation.EvalTable(reports, base, settings, split)


def _scorers(
    job: Job, adapter_paths: Sequence[str], scales: Sequence[float], **how: Any
) -> Iterator[tuple[str, float, Scorer]]:
    """Each adapter in each of its parts; the model is read once an adapter. how: `open_scorer`'s.

    The caller lets go of a scorer before it asks for the next: one model is in memory at a time.
    """
    from fpo_mlx.judge.evaluate import name_of

    for path in dict.fromkeys(adapter_paths) or ["base"]:
        scorer = None
        for scale in scales:
            if len(adapter_paths) * len(scales) > 1:
                how["say"](f"judging {name_of(path, scale)}")
            if scorer is None:
                scorer = open_scorer(job, path if adapter_paths else None, scale=scale, **how)
            else:
                take_part(scorer, path, scale)
            yield path, scale, scorer


def take_part(scorer: Scorer, adapter_path: str, scale: float) -> None:
    """Another part of the adapter's change: it is counted from the reference, put back first."""
    from fpo_mlx.model import adapters

    model = scorer.policy.model
    adapters.update(model, scorer.reference)
    adapters.fill(model, Path(adapter_path), scale=scale)


def check_scales(config: RunConfig, adapter_paths: Sequence[str], scales: Sequence[float]) -> None:
    """Raises: ConfigError where no part of an adapter can be taken."""
    if not adapter_paths:
        raise ConfigError("--adapter-scale: there is no adapter to scale. Add --adapter-path.")
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise ConfigError(f"--adapter-scale {scales}: wanted finite numbers, 0 or more.")
    for path in adapter_paths:
        if start := config.train.init_adapter or start_of(path):
            raise ConfigError(
                f"{path}: no part of it can be taken (--adapter-scale). It began from the adapter "
                f"{start} and holds it whole, so that its change from there is no multiple of it. "
                "For parts, fuse that one first and train on the fused model."
            )


def _asked(
    job: Job, pairs: Sequence[TokenPair], samples: int, max_tokens: int, say: Say
) -> list[np.ndarray]:
    """The first prompts of the split that are answered: such as leave an answer its room."""
    from fpo_mlx.judge.sampling import first_prompts

    if not samples:
        return []
    prompts = first_prompts([pair.prompt for pair in pairs], len(pairs))
    positions = job.tokenizer.limits.positions
    if positions is None:
        return prompts[:samples]
    fit = [prompt for prompt in prompts if len(prompt) + max_tokens <= positions]
    if not fit:
        check_room(prompts[:1], max_tokens, job.tokenizer)
    first = prompts[:samples]
    if passed := sum(len(prompt) + max_tokens > positions for prompt in first):
        say(
            f"{passed} of the first {len(first)} prompts get no sampled answer: the model's "
            f"{positions} positions leave them no room for --max-tokens {max_tokens}"
        )
    return fit[:samples]


def _with_answers(
    job: Job, scorer: Scorer, report: EvalReport, asked: Sequence[np.ndarray], sampling: Sampling
) -> EvalReport:
    """Sampled answers of the model as it stands."""
    from fpo_mlx.judge.sampling import records, sample

    if not asked:
        return report
    answers = list(sample(scorer.policy.model, asked, sampling, job.tokenizer.eos_token_ids))
    return report.with_answers(
        answers, records(answers, lambda ids: job.tokenizer.decode(ids.tolist(), skip_special=True))
    )


def open_scorer(
    job: Job,
    adapter_path: str | None,
    *,
    measure_kl: bool,
    say: Say,
    scale: float = 1.0,
    model: Path | None = None,
    half: bool = False,
) -> Scorer:
    """Base + adapter, looking at every SAE that was given whatever the objective needs.

    scale: part of the adapter's change that is taken (`adapters.fill`).
    model: judged in the place of the job's own and its adapter, against the job's reference.
    half: the reference's scores carry rounding of half precision.
    """
    from fpo_mlx.model import adapters
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.model.tapping import tapped
    from fpo_mlx.train.scoring import Scorer

    ref = job.config.reference
    loaded = open_model(
        model or job.model_path,
        adapter=None if adapter_path or model else job.adapter,
        trust_remote_code=ref.trust_remote_code,
        say=say,
    )
    reference: dict[str, Any] = {}
    if adapter_path:
        adapters.attach(loaded.model, adapters.read_spec(Path(adapter_path), loaded.model))
        if job.adapter:
            adapters.fill(loaded.model, job.adapter)
        reference = dict(adapters.parameters(loaded.model))
        adapters.fill(loaded.model, Path(adapter_path), scale=scale)
        loaded.model.eval()
    policy = tapped(loaded, job.saes, share_prompt=ref.share_prompt)
    encoders = [encoder_of(sae) for sae in job.saes]
    scorer = Scorer(
        policy, encoders, job.config.objective,
        feature_weights=job.feature_weights, measure_kl=measure_kl,
    )  # fmt: skip
    scorer.half |= half
    scorer.freeze_reference(reference or None)
    return scorer
