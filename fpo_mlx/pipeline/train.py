"""Train adapters against a cached reference."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import __version__, data
from fpo_mlx.cache import ReferenceCache
from fpo_mlx.config import RunConfig
from fpo_mlx.errors import CacheMismatch, ConfigError
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
from fpo_mlx.pipeline.plan import predicted_peak

if TYPE_CHECKING:
    from fpo_mlx.checkpoint import AdapterFolder
    from fpo_mlx.parallel import Ranks
    from fpo_mlx.reports import Report
    from fpo_mlx.scoring import Scorer
    from fpo_mlx.trainer import Trainer


def train(
    config: RunConfig,
    *,
    say: Say,
    progress: OnFill = lambda _: None,
    arm: Callable[[], Callable[[], int | None]] = lambda: lambda: None,
    begin: Callable[[int], None] = lambda _: None,
) -> Iterator[Report]:
    """Train adapters; yields the trainer's reports.

    begin: called with the number of iterations before the first one; arm: called when training
    proper begins; gives what the trainer asks whether to stop.
    """
    from fpo_mlx.checkpoint import AdapterFolder, check_resumable
    from fpo_mlx.parallel import open_ranks
    from fpo_mlx.reports import ScoredPairs
    from fpo_mlx.trainer import Trainer

    t = config.train
    ranks = open_ranks(pairs=t.batch_size * t.grad_accumulation_steps, patience=t.peer_timeout)
    job = open_job(config, adapter=t.init_adapter, say=say)
    pairs = read_pairs(job, "train", say)
    run = run_record(job, data.data_fingerprint(pairs))
    if t.resume and ranks.first:
        check_resumable(Path(t.adapter_path), run)
    valid = read_pairs(job, "valid", say) if has_split(job, "valid") else []
    if t.early_stopping and not valid:
        raise ConfigError(
            f"--early-stopping {t.early_stopping}: found no validation pairs in "
            f"{config.data.data}. Add a valid.jsonl (or --valid-split of a hub data set), or drop "
            "the setting."
        )
    predicted = predicted_peak(job, pairs)  # refuses adapters out of reach before the reference
    say(f"predicted peak memory of training: {predicted / 1e9:.2f} GB")
    agree = _agreement(ranks)
    store = reference_of(job, [*pairs, *valid], say, progress, other_weights=True, agree=agree)
    scorer, adapter_config = open_policy(job, say=say)
    out = AdapterFolder(Path(t.adapter_path), adapter_config, writes=ranks.first)
    scored, held_out = (ScoredPairs(part, scores(store, part)) for part in (pairs, valid))
    trainer = Trainer(scorer, scored, held_out if valid else None, t, out, arm(), ranks)
    begin(trainer.total)
    del job  # and with it the SAEs' numpy arrays: the encoders on the device are the only copy
    _announce(trainer, say)
    if "model" in store.differences:
        _compare_weights(trainer, store, say)
    with out.writing():
        if t.resume:
            trainer.resume()
            say(f"resumed after iteration {trainer.progress.iteration}")
        else:
            out.start(run)
        yield from trainer.run()
        if ranks.first:
            _compare_peaks(out, predicted, say)


def _compare_peaks(out: AdapterFolder, predicted: float, say: Say) -> None:
    """Say what `plan` predicted and what MLX measured, and keep both in run.json."""
    import mlx.core as mx

    measured = mx.get_peak_memory()
    say(f"peak memory {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB")
    peaks = {"predicted_peak_gb": predicted / 1e9, "measured_peak_gb": measured / 1e9}
    out.note({"memory": peaks})


def _agreement(ranks: Ranks) -> Callable[[Path, bool], bool]:
    """Whether the reference has to run, for all processes alike, and can run in all of them."""

    def agree(folder: Path, lacking: bool) -> bool:
        if not ranks.largest(int(lacking)):
            return False
        if not ranks.share_folder(folder):
            raise ConfigError(
                f"The processes of this run have no folder {folder} in common, so they cannot "
                "fill one cache. Run `fpo-mlx precompute` first, copy the cache to the same path "
                "on every machine, and name it with --reference."
            )
        return True

    return agree


def _compare_weights(trainer: Trainer, store: ReferenceCache, say: Say) -> None:
    """Say how far the policy is from a reference of other weights.

    Raises: CacheMismatch when that is more than --max-start-gap.
    """
    old, new = store.differences["model"]
    (gap, apart), bound = trainer.start_gaps(), trainer.config.max_start_gap
    found = (
        f"{store.folder} was made with other weights than this run's (model: cache {old}, this "
        f"run {new}). At step 0 |u| / beta is up to {gap:.3g} nats, and log-probs differ by up to "
        f"{apart:.3g} nats a token"
    )
    if max(gap, apart) <= bound:
        say(f"warning: {found}")
        return
    raise CacheMismatch(
        f"{found}, over --max-start-gap {bound:g}. Run `fpo-mlx precompute` with this run's model, "
        "or raise --max-start-gap if another reference is what you want."
    )


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
    spec = attach_adapters(job, loaded.model, say)
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


def attach_adapters(job: Job, model: Any, say: Say) -> Any:
    """Fresh adapters, or those of --init-adapter, on layers that the constraint can reach.

    Raises: ConfigError where it can reach none of them.
    """
    from fpo_mlx.model import adapters

    pooled = job.config.objective.pooled
    sites = [sae.site for sae in job.saes if pooled and sae.site is not None]
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
