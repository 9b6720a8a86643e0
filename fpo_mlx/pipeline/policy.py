"""The model that is trained: its adapters, and the scorer around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import Job, Say
from fpo_mlx.records import Site

if TYPE_CHECKING:
    from fpo_mlx.train.scoring import Scorer


def open_policy(job: Job, *, say: Say) -> tuple[Scorer, dict[str, Any]]:
    """The model with adapters to train and taps, and what adapter_config.json will say."""
    import mlx.core as mx

    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.train.scoring import Scorer

    t, o, ref = job.config.train, job.config.objective, job.config.reference
    loaded = load_model(job.model_path, trust_remote_code=ref.trust_remote_code)
    for note in loaded.notes:
        say(note)
    mx.random.seed(t.seed)
    if job.feature_weights and not o.pooled:
        say(f"warning: --feature-weights does nothing with --constraint {o.constraint}")
    if o.gamma and o.margin == "reference":
        say(f"warning: --gamma {o.gamma} does nothing: it is of --margin constant")
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
        highest = max(adapters.block_of(model)[key] for key in spec.keys)
        if sites and highest > max(_deepest(sites)):
            say(
                f"warning: {init} adapts blocks up to {highest}, above the SAE's; adapters there "
                "can change the output where the constraint does not look"
            )
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


def _deepest(sites: Sequence[Site]) -> list[int]:
    """For each site the last block that it sees anything of."""
    return [site.layer - (site.kind == "resid_pre") for site in sites]


def _new_adapters(job: Job, model: Any, say: Say) -> Any:
    """Fresh adapters; where an SAE is given none above its block.

    Whether the constraint is in force does not matter, so that an ablation changes one thing.
    """
    from fpo_mlx.model import adapters

    t, last = job.config.train, len(model.layers) - 1
    sites = [sae.site for sae in job.saes if sae.site is not None]
    deepest = max(_deepest(sites), default=last)
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
