"""What every command that scores pairs starts from: model, tokenizer, SAEs, pairs."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fpo_mlx import data
from fpo_mlx.cache import CacheIdentity
from fpo_mlx.config import COUNTABLE, ReferenceConfig, RunConfig, SaeTrainConfig
from fpo_mlx.data.feature_files import Weights, read_weights
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import ConfigError, SaeError
from fpo_mlx.pipeline.origins import warn_of_origin
from fpo_mlx.pipeline.prepared import Say as Say
from fpo_mlx.pipeline.prepared import columns as columns
from fpo_mlx.pipeline.prepared import hub_splits as hub_splits
from fpo_mlx.pipeline.prepared import read_splits, tokenizer_of
from fpo_mlx.records import SITE_KINDS, Projection, SaeWeights, Site, SiteKind, TokenPair
from fpo_mlx.reference import weights
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.check import check_fit, resolve_site, z_widths
from fpo_mlx.sae.resolve import resolve
from fpo_mlx.storage.hub import read_config, resolve_model, size_in


@dataclass(frozen=True)
class Job:
    """What every command that scores pairs starts from."""

    config: RunConfig
    model_path: Path
    tokenizer: ChatTokenizer
    saes: tuple[SaeWeights, ...]
    identity: CacheIdentity  # of what the reference gives: this model, this adapter, these SAEs
    feature_weights: Weights = ()  # per SAE; of --feature-weights
    adapter: Path | None = None  # of the reference, whose fingerprint the identity holds
    backend: str = "mlx"  # that scores with the reference
    device: str | None = None  # of the torch backend
    projections: tuple[Projection, ...] = ()  # of --project-out, where this command heeds it


def open_job(
    config: RunConfig,
    *,
    say: Say,
    adapter: str | None = None,
    need_sae: bool | None = None,
    backend: str = "mlx",
    device: str | None = None,
    projected: bool = False,
) -> Job:
    """Resolve model, tokenizer and SAEs, and fingerprint them. Reads weights, loads no model.

    adapter: of the reference; default: --init-adapter's. need_sae: `open_saes` knows. projected:
    heed --project-out, which is of training passes and of the reference they are compared with.
    """
    model = need_model(config)
    need_data(config)
    check_sae_named(config, need_sae)  # before the model is fetched
    path = resolve_model(model)
    tokenizer = open_tokenizer(config, path, say)
    start = adapter or config.train.init_adapter
    opened = open_saes(config, read_config(path), need=need_sae, say=say)
    fingerprint = weights.model_fingerprint(path)  # reads all of it, so behind what can be refused
    warn_of_adapters([start], config, path, say, fingerprint)
    own = Path(start) if start else None
    projections, projection_print = (), None
    if projected and config.train.project_out is not None:
        projections, projection_print = open_projections(config, read_config(path), say)
    identity = CacheIdentity(
        model=fingerprint,
        tokenizer=tokenizer.fingerprint(),
        adapter=weights.adapter_fingerprint(own),
        saes=tuple((sae.fingerprint(), str(sae.site)) for sae in opened),
        projected=projection_print,
    )
    named = open_weights(config, opened)
    return Job(config, path, tokenizer, opened, identity, named, own, backend, device, projections)


def need_model(config: RunConfig) -> str:
    """What --model says. Raises: ConfigError when it says nothing."""
    if not config.reference.model:
        raise ConfigError("--model is missing. Wanted a model folder or hub id.")
    return config.reference.model


def need_data(config: RunConfig) -> None:
    """Raises: ConfigError where --data says nothing."""
    if not config.data.data:
        raise ConfigError("--data is missing. Wanted a folder, a .jsonl file or a hub data set id.")


def memory_of(memory_gb: float | None) -> float:
    """Bytes that may be used: of --memory-gb, or what this machine lets MLX use.

    Raises: ConfigError for what is no size.
    """
    from fpo_mlx.machine import device

    if memory_gb is None:
        return device.memory()
    if not 0 < memory_gb < COUNTABLE:
        raise ConfigError(
            f"--memory-gb {memory_gb:g}: wanted more than 0 and less than {COUNTABLE:g}."
        )
    return memory_gb * 1e9


def one_sae(config: RunConfig, what: str) -> str:
    """The --sae of a command that takes one. Raises: ConfigError for none or several."""
    saes = config.reference.sae
    if len(saes) != 1:
        raise ConfigError(f"--sae: found {len(saes)}, wanted exactly one for {what}.")
    return saes[0]


def warn_of_adapters(
    adapters: Iterable[str | Path | None],
    config: RunConfig,
    path: Path,
    say: Say,
    known: str | None = None,
) -> None:
    """`warn_of_origin` by the settings; path: of the model's folder."""
    d, model = config.data, need_model(config)
    warn_of_origin(adapters, model, path, d.chat_template, say, d.chat_template_args, known)


def need_features(config: RunConfig, what: str) -> None:
    """Raises: ConfigError where `what` ("--scaling") reads features and the run compares none."""
    if config.objective.constraint == "activations":
        raise ConfigError(f"{what} reads an SAE's features: leave --constraint out.")


def open_tokenizer(config: RunConfig, path: Path, say: Say = lambda _: None) -> ChatTokenizer:
    """The tokenizer of the model folder `path`, with the chat template of the settings."""
    d, trust = config.data, config.reference.trust_remote_code
    return tokenizer_of(path, d.chat_template, d.chat_template_args, trust, say)


def open_weights(config: RunConfig, saes: Sequence[SaeWeights]) -> Weights:
    """What --feature-weights says of each SAE. Raises: ConfigError, also where nothing uses it."""
    o = config.objective
    if o.feature_weights is None:
        return ()
    if o.constraint == "activations" or not saes:
        raise ConfigError(
            f"--feature-weights {o.feature_weights}: there are no SAE features to weigh. Give "
            "--sae with --constraint features, or leave the weights out."
        )
    return read_weights(o.feature_weights, [sae.n_features for sae in saes])


def open_projections(
    config: RunConfig, model_config: Mapping[str, Any], say: Say
) -> tuple[tuple[Projection, ...], str]:
    """What --project-out takes out of which site, and a fingerprint of it.

    Raises: ConfigError, SaeError for features that have no direction at their site.
    """
    import numpy as np

    path, ref = str(config.train.project_out), config.reference
    if not ref.sae:
        raise ConfigError(
            f"--project-out {path}: --sae is missing. Wanted the SAE whose features it names."
        )
    saes = [
        at_site(
            read_sae(spec, ref, lambda _: None, on_disk=True),
            config,
            model_config,
            lambda _: None,
        )
        for spec in ref.sae
    ]
    named = read_weights(path, [sae.n_features for sae in saes], "--project-out")
    digest, rows = hashlib.sha256(), {}
    for sae, features in zip(saes, named, strict=True):
        if not features:
            continue
        if not sae.writes_back:
            raise SaeError(
                f"--project-out {path}: {sae.source} has no decoder at the place that it reads, so "
                "its features have no direction there. Use an SAE that has one."
            )
        assert sae.site is not None  # at_site has settled it
        assert sae.w_dec is not None
        own = np.ascontiguousarray(sae.w_dec[sorted(features)], dtype="<f4")
        digest.update(f"{sae.site}|{own.shape}".encode() + own.tobytes())
        rows.setdefault(sae.site, []).append(own)
    made = tuple(Projection.of(site, np.concatenate(parts)) for site, parts in rows.items())
    for one in made:
        say(f"--project-out takes {one.basis.shape[1]} directions out of the {one.site}")
    return made, digest.hexdigest()


def check_sae_named(config: RunConfig, need: bool | None = None) -> None:
    """Raises: ConfigError where --sae says nothing and has to. need: as `open_saes` takes it."""
    ref = config.reference
    if ref.sae or not (config.objective.needs_sae if need is None else need):
        return
    of = f" --model {shlex.quote(ref.model)}" if ref.model else ""
    other = (
        ". Or train without one: --objective tdpo2 holds every token near the reference, at a "
        "lower rate (--learning-rate 5e-6)"
    )
    raise ConfigError(
        "--sae is missing: a sparse autoencoder (SAE), whose features are looked at. Give one: "
        f"`fpo-mlx sae list{of}` names public ones, `fpo-mlx sae train` makes one"
        f"{other if need is None else ''}."
    )


def open_saes(
    config: RunConfig, model_config: Mapping[str, Any], *, need: bool | None = None, say: Say
) -> tuple[SaeWeights, ...]:
    """The SAEs that --sae names, at their sites, checked against the model.

    need: whether there has to be one; None where the objective decides.
    """
    check_sae_named(config, need)
    ref = config.reference
    if len(set(ref.sae)) < len(ref.sae):
        raise ConfigError(f"--sae: the same one stands there twice: {', '.join(ref.sae)}.")
    if len(ref.sae) > 1 and ref.layer is not None:
        raise ConfigError("--layer speaks of one SAE; with several, their own metadata decides.")
    opened = []
    for spec in ref.sae:
        sae = read_sae(spec, ref, say, decoder=False, on_disk=True)
        for note in sae.notes:
            say(f"{spec}: {note}")
        opened.append(at_site(sae, config, model_config, say))
    if config.objective.constraint == "activations":
        opened = [_identity_sae(sae.site, sae.d_in, sae.source) for sae in opened if sae.site]
        if not opened and ref.layer is not None:
            opened = [_activations_of(ref.layer, ref.site or "resid_post", model_config)]
        if not opened:
            raise ConfigError("--constraint activations: give --layer (and --site), or an --sae.")
    return tuple(opened)


def read_sae(
    spec: str,
    ref: ReferenceConfig | SaeTrainConfig,
    say: Say,
    *,
    decoder: bool = True,
    on_disk: bool = False,
) -> SaeWeights:
    """One SAE, fetched if need be. ref: the settings that say how SAE files are read."""
    return load_sae(
        resolve(spec, allow_pickle=ref.allow_pickle, report=say),
        format=ref.sae_format,
        allow_pickle=ref.allow_pickle,
        decoder=decoder,
        on_disk=on_disk,
        k=ref.sae_k,
        llama_scope_gate=ref.llama_scope_gate,
        norm_scaling_factor=ref.norm_scaling_factor,
        name=spec,
    )


def at_site(
    sae: SaeWeights, config: RunConfig, model_config: Mapping[str, Any], say: Say
) -> SaeWeights:
    """The SAE with its site settled and checked against the model's widths and blocks."""
    ref = config.reference
    site = resolve_site(sae, ref.layer, ref.site)
    if sae.site is None and ref.site is None:
        say(f"{sae.source} does not say its site: {site} is taken, --site names another")
    warnings = check_fit(
        sae,
        site=site,
        hidden_size=size_in(model_config, "hidden_size"),
        n_layers=size_in(model_config, "num_hidden_layers"),
        z_sizes=z_widths(model_config, site.layer),
        model_name=ref.model,
    )
    for warning in warnings:
        say(f"warning: {warning}")
    return replace(sae, site=site)


def _activations_of(layer: int, kind: str, model_config: Mapping[str, Any]) -> SaeWeights:
    """What a site holds, without an SAE of it. Raises: ConfigError where the model has no such."""
    last = size_in(model_config, "num_hidden_layers") - 1
    if kind not in SITE_KINDS:
        raise ConfigError(f"--site {kind}: wanted one of {', '.join(SITE_KINDS)}.")
    if not 0 <= layer <= last:
        raise ConfigError(f"--layer {layer}: wanted 0 to {last}, the blocks of this model.")
    site, widths = Site(layer, cast(SiteKind, kind)), {size_in(model_config, "hidden_size")}
    if kind == "attn_z":
        widths = z_widths(model_config, layer)
    if len(widths) != 1:
        found = " or ".join(map(str, sorted(widths))) or "nothing"
        raise ConfigError(
            f"--site {kind}: the model's config.json has to say how wide the {site} is, and says "
            f"it in no way that is known here ({found}). Give another site, or an --sae of it."
        )
    return _identity_sae(site, widths.pop())


def _identity_sae(site: Site, width: int, source: str = "activations") -> SaeWeights:
    """The site's own coordinates as features: D on pooled activations, the paper's ablation."""
    import numpy as np

    eye, zeros = np.eye(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    return SaeWeights("identity", eye, zeros, site=site, source=source, format="identity")


def read_pairs(job: Job, split: str, say: Say) -> list[TokenPair]:
    """One split as token pairs; cuts and drops are said."""
    return read_splits(job.config, job.tokenizer, (split,), say)[split]


def splits_of(job: Job) -> tuple[str, ...]:
    """Every split that the data have; train where there is none, which then says what is wrong."""
    there = data.find_splits(job.config.data.data, hub_splits(job.config))
    return tuple(name for name in data.SPLITS if name in there) or ("train",)


def has_split(job: Job, split: str) -> bool:
    return split in data.find_splits(job.config.data.data, hub_splits(job.config))
