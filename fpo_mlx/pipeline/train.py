"""Train adapters against a cached reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import __version__, data
from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.featurefiles import weights_fingerprint
from fpo_mlx.pipeline.job import (
    Job,
    OnFill,
    Say,
    has_split,
    open_job,
    read_pairs,
    reference_of,
    scores,
)
from fpo_mlx.records import Site

if TYPE_CHECKING:
    from fpo_mlx.reports import Report
    from fpo_mlx.scoring import Scorer
    from fpo_mlx.trainer import Trainer


def train(
    config: RunConfig,
    *,
    say: Say,
    progress: OnFill = lambda _: None,
    arm: Callable[[], Callable[[], int | None]] = lambda: lambda: None,
) -> Iterator[Report]:
    """Train adapters; yields the trainer's reports.

    arm: called when training proper begins; gives what the trainer asks whether to stop.
    """
    from fpo_mlx.checkpoint import AdapterFolder, check_resumable
    from fpo_mlx.reports import ScoredPairs
    from fpo_mlx.trainer import Trainer

    t = config.train
    job = open_job(config, adapter=t.init_adapter, say=say)
    pairs = read_pairs(job, "train", say)
    run = run_record(job, data.data_fingerprint(pairs))
    if t.resume:
        check_resumable(Path(t.adapter_path), run)
    valid = read_pairs(job, "valid", say) if has_split(job, "valid") else []
    if t.early_stopping and not valid:
        raise ConfigError(
            f"--early-stopping {t.early_stopping}: found no validation pairs in "
            f"{config.data.data}. Add a valid.jsonl (or --valid-split of a hub data set), or drop "
            "the setting."
        )
    store = reference_of(job, [*pairs, *valid], say, progress)
    scorer, adapter_config = open_policy(job, say=say)
    out = AdapterFolder(Path(t.adapter_path), adapter_config)
    scored, held_out = (ScoredPairs(part, scores(store, part)) for part in (pairs, valid))
    trainer = Trainer(scorer, scored, held_out if valid else None, t, out, arm())
    _announce(trainer, say)
    with out.writing():
        if t.resume:
            trainer.resume()
            say(f"resumed after iteration {trainer.progress.iteration}")
        else:
            out.start(run)
        yield from trainer.run()


def _announce(trainer: Trainer, say: Say) -> None:
    from fpo_mlx.optimizer import trainable_count

    trainable, total = trainable_count(trainer.model)
    say(
        f"training {trainable / 1e6:.3f} M of {total / 1e6:.1f} M parameters on "
        f"{len(trainer.train)} pairs, {trainer.total} iterations of {trainer.config.batch_size}"
    )


def run_record(job: Job, data_fingerprint: str) -> dict[str, Any]:
    """What run.json holds: settings, versions, fingerprints. No environment, no tokens."""
    from importlib.metadata import version

    names = ("mlx", "mlx-lm", "numpy", "transformers")
    return {
        "settings": job.config.as_dict(),
        "fingerprints": {
            "model": job.identity.model,
            "adapter": job.identity.adapter,
            "tokenizer": job.identity.tokenizer,
            "data": data_fingerprint,
            "saes": [list(sae) for sae in job.identity.saes],
            "named_features": weights_fingerprint(job.feature_weights),
        },
        "versions": {"fpo-mlx": __version__, "python": platform.python_version()}
        | {name: version(name) for name in names},
    }


def open_policy(job: Job, *, say: Say) -> tuple[Scorer, dict[str, Any]]:
    """The model with adapters to train and taps, and what adapter_config.json will say."""
    import mlx.core as mx

    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.scoring import Scorer, encoder_of

    t, o, ref = job.config.train, job.config.objective, job.config.reference
    loaded = load_model(job.model_path, trust_remote_code=ref.trust_remote_code)
    for note in loaded.notes:
        say(note)
    mx.random.seed(t.seed)
    if job.feature_weights and not o.pooled:
        say(f"warning: --feature-weights does nothing with --constraint {o.constraint}")
    saes = job.saes if o.pooled else ()
    sites = [sae.site for sae in saes if sae.site is not None]
    spec = _attach_adapters(job, loaded.model, sites, say)
    policy = Policy(
        loaded.model,
        loaded.config,
        sites,
        share_prompt=ref.share_prompt,
        grad_checkpoint=t.grad_checkpoint,
    )
    if ref.share_prompt and not policy.shares_prompt:
        say("this model's caches are not plain keys and values: prompts run twice a pair")
    scorer = Scorer(
        policy, [encoder_of(sae) for sae in saes], o, feature_weights=job.feature_weights
    )
    return scorer, spec.as_config(ref.model)


def _attach_adapters(job: Job, model: Any, sites: Sequence[Site], say: Say) -> Any:
    """Fresh adapters, or those of --init-adapter, on layers that the constraint can reach."""
    from fpo_mlx.model import adapters

    init = job.config.train.init_adapter
    if init:
        spec = adapters.load(model, Path(init))
        say(f"starting from {init}; its rank, scale and layers are kept")
    else:
        spec = _new_adapters(job, model, say)
        adapters.attach(model, spec)
    if adapters.unreached(sites, spec.keys, adapters.block_of(model)):
        raise ConfigError(
            "no adapted layer lies at or below the SAE's block, so the constraint would have no "
            f"gradient: the SAE reads the {sites[0]}. Adapt lower blocks (--num-layers, "
            "lora_parameters.keys), or use an SAE nearer to the output."
        )
    return spec


def _new_adapters(job: Job, model: Any, say: Say) -> Any:
    """Fresh adapters; where an SAE is given none above its block.

    Whether the constraint is in force does not matter, so that an ablation changes one thing.
    """
    from fpo_mlx.model import adapters

    t, last = job.config.train, len(model.layers) - 1
    sites = [sae.site for sae in job.saes if sae.site is not None]
    deepest = max((s.layer - (s.kind == "resid_pre") for s in sites), default=last)
    if t.adapt_above_sae and deepest < last:
        say(
            f"warning: blocks {deepest + 1} to {last} lie above the SAE; adapters there can change "
            "the output where the constraint does not look"
        )
        deepest = last
    n, keys = adapters.adapted_paths(model, t.num_layers, deepest, t.lora["keys"])
    lora = t.lora
    return adapters.AdapterSpec(
        t.fine_tune_type, n, int(lora["rank"]), float(lora["scale"]), float(lora["dropout"]), keys
    )
