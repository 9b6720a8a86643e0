"""Judge base + adapter on held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.config import RunConfig
from fpo_mlx.pipeline.job import Job, OnFill, Say, open_job, read_pairs, reference_of, scores

if TYPE_CHECKING:
    from fpo_mlx.evaluate import EvalReport
    from fpo_mlx.scoring import Scorer


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
    from fpo_mlx import evaluate as evaluation
    from fpo_mlx.reports import ScoredPairs

    job = open_job(config, adapter=config.train.init_adapter, say=say, need_sae=False)
    pairs = read_pairs(job, split, say)
    store = reference_of(job, pairs, say, progress)
    scorer = open_scorer(job, adapter_path, measure_kl=measure_kl, say=say)
    return evaluation.evaluate(scorer, ScoredPairs(pairs, scores(store, pairs)))


def open_scorer(job: Job, adapter_path: str | None, *, measure_kl: bool, say: Say) -> Scorer:
    """Base + adapter, looking at every SAE that was given whatever the objective needs."""
    from fpo_mlx.model import adapters
    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.scoring import Scorer, encoder_of

    loaded = load_model(job.model_path, trust_remote_code=job.config.reference.trust_remote_code)
    for note in loaded.notes:
        say(note)
    reference: dict[str, Any] = {}
    if adapter_path:
        spec = adapters.read_spec(Path(adapter_path), loaded.model)
        adapters.attach(loaded.model, spec)
        if init := job.config.train.init_adapter:
            adapters.fill(loaded.model, Path(init) / adapters.WEIGHTS)
        reference = dict(adapters.parameters(loaded.model))
        adapters.fill(loaded.model, Path(adapter_path) / adapters.WEIGHTS)
    elif init := job.config.train.init_adapter:
        adapters.load(loaded.model, Path(init))
    loaded.model.eval()
    sites = [sae.site for sae in job.saes if sae.site is not None]
    policy = Policy(
        loaded.model, loaded.config, sites, share_prompt=job.config.reference.share_prompt
    )
    encoders = [encoder_of(sae) for sae in job.saes]
    scorer = Scorer(
        policy, encoders, job.config.objective,
        feature_weights=job.feature_weights, measure_kl=measure_kl,
    )  # fmt: skip
    scorer.freeze_reference(reference or None)
    return scorer
