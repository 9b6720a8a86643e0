"""The model that is trained: its adapters, and the scorer around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import Job, Say
from fpo_mlx.records import Site
from fpo_mlx.sae.check import DEEP

if TYPE_CHECKING:
    import mlx.nn as nn

    from fpo_mlx.model.adapters import AdapterSpec
    from fpo_mlx.train.scoring import Scorer

UNSEEN = "adapters there can change the output where the constraint does not look"
LOWER = "Adapt lower blocks (--num-layers, lora_parameters.keys), or use"


@dataclass(frozen=True)
class Outline:
    """The model of a run, its weights not read yet, and the adapters that it will have."""

    model: nn.Module
    spec: AdapterSpec


def outline_of(job: Job, say: Say) -> Outline:
    """Decide on the adapters, before anything long.

    Raises: ConfigError, as `check_reach` does; SaeError, ModelError for a site that does not fit.
    """
    from fpo_mlx.model.load import read_model
    from fpo_mlx.model.tapping import refuse_other_widths

    ref = job.config.reference
    model = read_model(job.model_path, trust_remote_code=ref.trust_remote_code).model
    refuse_other_widths(job.saes, model)
    spec = _choose_adapters(job, model, say)
    check_reach(job, model, spec)
    _say_how_deep(job, model, say)
    return Outline(model, spec)


def _say_how_deep(job: Job, model: nn.Module, say: Say) -> None:
    """A drift in the middle of the model says less of its answers than one near the output."""
    from fpo_mlx.model.trees import blocks_of

    o, sites, count = job.config.objective, _sites(job), len(blocks_of(model))
    held = o.alpha > 0 or o.target_drift is not None
    if held and sites and (deepest := max(_deepest(sites))) + 1 < DEEP * count:
        say(
            f"warning: the SAE reads block {deepest} of {count} (from 0), and blocks above it may "
            "make much of a small drift: where this was measured, it came with several times "
            "the KL. Take an SAE near the output; else name a small drift, and judge by the KL of "
            "`evaluate`."
        )


def check_reach(job: Job, model: nn.Module, spec: AdapterSpec) -> None:
    """Raises: ConfigError where no adapted layer lies where the constraint can see it."""
    from fpo_mlx.model import adapters

    for site in _sites(job):
        if set(spec.keys) <= adapters.unseen(model, [site]):  # no gradient for the constraint
            _refuse_reach(site, LOWER)


def _refuse_reach(site: Site, way: str = "Use") -> NoReturn:
    raise ConfigError(
        "no adapted layer lies at or before what the SAE reads, so the constraint would have no "
        f"gradient: it reads the {site}. {way} an SAE nearer to the output."
    )


def put_adapters(job: Job, model: nn.Module, spec: AdapterSpec) -> None:
    """Fresh adapters, or those that the reference has."""
    from fpo_mlx.model import adapters

    adapters.attach(model, spec)
    if job.adapter:
        adapters.fill(model, job.adapter)


def open_policy(
    job: Job, spec: AdapterSpec | None = None, *, say: Say
) -> tuple[Scorer, dict[str, Any]]:
    """The model with adapters to train and taps, and what adapter_config.json will say.

    spec: of the adapters, as `outline_of` decided; default: decided now.
    """
    import mlx.core as mx

    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.model.tapping import tapped
    from fpo_mlx.train.scoring import Scorer

    t, o, ref = job.config.train, job.config.objective, job.config.reference
    spec = spec or outline_of(job, say).spec
    loaded = open_model(job.model_path, trust_remote_code=ref.trust_remote_code, say=say)
    if job.feature_weights and not o.pooled:
        say(f"warning: --feature-weights does nothing with --constraint {o.constraint}")
    if o.gamma and o.margin == "reference":
        say(f"warning: --gamma {o.gamma} does nothing: it is of --margin constant")
    mx.random.seed(t.seed)
    put_adapters(job, loaded.model, spec)
    policy = tapped(
        loaded,
        job.saes if o.pooled else (),
        share_prompt=ref.share_prompt,
        grad_checkpoint=t.grad_checkpoint,
        projections=job.projections,
    )
    if ref.share_prompt and not policy.shares_prompt:
        say("this model's caches are not plain keys and values: prompts run twice per pair")
    encoders = [encoder_of(sae) for sae in (job.saes if o.pooled else ())]
    scorer = Scorer(policy, encoders, o, feature_weights=job.feature_weights)
    return scorer, spec.as_config(ref.model)


def _sites(job: Job) -> list[Site]:
    """Where the constraint looks."""
    saes = job.saes if job.config.objective.pooled else ()
    return [sae.site for sae in saes if sae.site is not None]


def _choose_adapters(job: Job, model: nn.Module, say: Say) -> AdapterSpec:
    """Fresh adapters by the settings, or those of --init-adapter as they are."""
    from fpo_mlx.model import adapters

    if not job.adapter:
        return _new_adapters(job, model, say)
    spec = adapters.read_spec(job.adapter, model)
    say(f"starting from {job.adapter}; its rank, scale and layers are kept")
    blocks = adapters.block_of(model)
    if outside := [key for key in spec.keys if key not in blocks]:
        raise ConfigError(
            f"--init-adapter {job.adapter} adapts {outside[0]}, which lies in no block "
            f"({len(outside)} of {len(spec.keys)} layers). Only layers of blocks are trained: fuse "
            "it into the model (`fpo-mlx fuse`), and train new adapters on the fused folder."
        )
    _warn_of_start(job, spec, blocks, adapters.unseen(model, _sites(job)), say)
    return spec


def _warn_of_start(
    job: Job, spec: AdapterSpec, blocks: Mapping[str, int], unseen: set[str], say: Say
) -> None:
    """Of adapters that are there already, behind all that the SAEs see."""
    if not (above := {blocks[key] for key in spec.keys if key in unseen}):
        return
    highest, site = max(above), _last(_sites(job))
    where = f"blocks up to {highest}, above the SAE's"
    if highest == site.layer and site.kind != "resid_pre":
        where = f"layers of block {highest} behind the {site.kind} that the SAE reads"
    say(f"warning: {job.adapter} adapts {where}; {UNSEEN}")


def _last(sites: Sequence[Site]) -> Site:
    """One of those that see most."""
    return max(sites, key=lambda site: _deepest([site]))


def _deepest(sites: Sequence[Site]) -> list[int]:
    """For each site the last block that it sees anything of."""
    return [site.layer - (site.kind == "resid_pre") for site in sites]


def _new_adapters(job: Job, model: nn.Module, say: Say) -> AdapterSpec:
    """Fresh adapters; where an SAE is given, none of what it sees nothing of.

    Whether the constraint is in force does not matter, so that an ablation changes one thing.
    """
    from fpo_mlx.model import adapters
    from fpo_mlx.model.trees import blocks_of

    t, last = job.config.train, len(blocks_of(model)) - 1
    sites = [sae.site for sae in job.saes if sae.site is not None]
    deepest = last if t.adapt_above_sae else max(_deepest(sites), default=last)
    if deepest < 0:  # what goes into the first block
        _refuse_reach(sites[0])
    n, keys = adapters.adapted_paths(model, t.num_layers, deepest, t.lora["keys"])
    unseen = adapters.unseen(model, sites)
    above = [key for key in keys if key in unseen]
    if above and t.adapt_above_sae:
        say(
            f"warning: {len(above)} of {len(keys)} adapted layers lie behind what the SAE reads "
            f"(the {_last(sites)}); {UNSEEN}"
        )
    elif above:
        keys = _without(above, keys, _last(sites), say)
    lora = t.lora
    return adapters.AdapterSpec(
        t.fine_tune_type, n, int(lora["rank"]), float(lora["scale"]), float(lora["dropout"]), keys
    )


def _without(above: Sequence[str], keys: Sequence[str], site: Site, say: Say) -> tuple[str, ...]:
    """The layers before what the SAE reads within its block. Raises: ConfigError for none."""
    kept = tuple(key for key in keys if key not in above)
    if not kept:
        _refuse_reach(site, LOWER)
    say(
        f"{len(above)} layers of block {site.layer} lie behind the {site.kind} that the SAE reads, "
        "and get no adapters"
    )
    return kept
