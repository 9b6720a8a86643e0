"""One function per command: wiring only. Modules that import mlx are imported inside."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import __version__, cache, data, paths
from fpo_mlx.cache import CacheIdentity, FillReport, ReferenceCache
from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.hub import read_config, resolve_model
from fpo_mlx.records import PairScore, SaeWeights, Site, TokenPair
from fpo_mlx.reference import open_backend, weights
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.check import check_fit, resolve_site
from fpo_mlx.sae.resolve import resolve
from fpo_mlx.tokenizer import ChatTokenizer, load_tokenizer

if TYPE_CHECKING:
    from fpo_mlx.evaluate import EvalReport
    from fpo_mlx.scoring import Scorer
    from fpo_mlx.trainer import Report

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What every command that scores pairs starts from."""

    config: RunConfig
    model_path: Path
    tokenizer: ChatTokenizer
    saes: tuple[SaeWeights, ...]
    identity: CacheIdentity


def open_job(
    config: RunConfig, *, adapter: str | None, say: Say, need_sae: bool | None = None
) -> Job:
    """Resolve model, tokenizer and SAEs, and fingerprint them. Reads weights, loads no model."""
    ref = config.reference
    if not ref.model:
        raise ConfigError("--model is missing. Wanted a model folder or hub id.")
    path = resolve_model(ref.model)
    template = config.data.chat_template
    tokenizer = load_tokenizer(
        path,
        chat_template=Path(template) if template else None,
        trust_remote_code=ref.trust_remote_code,
    )
    need = config.objective.needs_sae if need_sae is None else need_sae
    opened = open_saes(config, read_config(path), need=need, say=say)
    identity = CacheIdentity(
        model=weights.model_fingerprint(path),
        tokenizer=tokenizer.fingerprint(),
        adapter=weights.adapter_fingerprint(Path(adapter)) if adapter else "none",
        saes=tuple((sae.fingerprint(), str(sae.site)) for sae in opened),
    )
    return Job(config, path, tokenizer, opened, identity)


def open_saes(
    config: RunConfig, model_config: Mapping[str, Any], *, need: bool, say: Say
) -> tuple[SaeWeights, ...]:
    """The SAEs that --sae names, at their sites, checked against the model."""
    ref = config.reference
    if need and not ref.sae:
        raise ConfigError(
            "--sae is missing: the constraint `features` needs a sparse autoencoder. Give one "
            "(`fpo-mlx sae list` names public ones), or choose --constraint activations, kl or none."
        )
    if len(ref.sae) > 1 and ref.layer is not None:
        raise ConfigError("--layer speaks of one SAE; with several, their own metadata decides.")
    opened = []
    for spec in ref.sae:
        path = resolve(spec, report=say)
        sae = load_sae(
            path, format=ref.sae_format, allow_pickle=ref.allow_pickle, decoder=False, name=spec
        )
        for note in sae.notes:
            say(f"{spec}: {note}")
        opened.append(at_site(sae, config, model_config, say))
    if config.objective.constraint == "activations":
        opened = [_identity_sae(sae.site, sae.d_in) for sae in opened if sae.site]
        if not opened and ref.layer is not None:
            site = Site(ref.layer, ref.site or "resid_post")  # type: ignore[arg-type]
            opened = [_identity_sae(site, int(model_config["hidden_size"]))]
        if not opened:
            raise ConfigError("--constraint activations: give --layer (and --site), or an --sae.")
    return tuple(opened)


def at_site(
    sae: SaeWeights, config: RunConfig, model_config: Mapping[str, Any], say: Say
) -> SaeWeights:
    """The SAE with its site settled and checked against the model's widths and blocks."""
    ref = config.reference
    site = resolve_site(sae, ref.layer, ref.site)
    heads = model_config.get("num_attention_heads")
    width = int(model_config["hidden_size"])
    head = model_config.get("head_dim") or (width // heads if heads else None)
    warnings = check_fit(
        sae,
        site=site,
        hidden_size=width,
        n_layers=int(model_config["num_hidden_layers"]),
        z_size=heads * head if heads and head else None,
        model_name=ref.model,
    )
    for warning in warnings:
        say(f"warning: {warning}")
    return replace(sae, site=site)


def _identity_sae(site: Site | None, width: int) -> SaeWeights:
    """The site's own coordinates as features: D on pooled activations, the paper's ablation."""
    import numpy as np

    eye, zeros = np.eye(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    return SaeWeights("identity", eye, zeros, site=site, format="identity")


def read_pairs(job: Job, split: str, say: Say) -> list[TokenPair]:
    """One split as token pairs; cuts and drops are said."""
    d = job.config.data
    if not d.data:
        raise ConfigError("--data is missing. Wanted a folder, a .jsonl file or a hub data set id.")
    columns = data.Columns(d.prompt_feature, d.chosen_feature, d.rejected_feature, d.system_feature)
    hub = data.HubSplits(d.train_split, d.valid_split, d.test_split)
    rows = data.read_split(d.data, split, columns, hub)
    done = data.tokenize_rows(rows, job.tokenizer, d.max_seq_length)
    for line in done.report.lines():
        say(f"{split}: {line}")
    return done.pairs


def has_split(job: Job, split: str) -> bool:
    d = job.config.data
    hub = data.HubSplits(d.train_split, d.valid_split, d.test_split)
    return split in data.find_splits(d.data, hub)


def default_cache(identity: CacheIdentity) -> Path:
    return paths.cache_root() / "reference" / identity.digest()[:16]


def fill_cache(
    job: Job,
    pairs: Sequence[TokenPair],
    *,
    folder: Path,
    adapter: str | None,
    say: Say,
    backend: str = "mlx",
    device: str | None = None,
    progress: Callable[[FillReport], None] = lambda _: None,
) -> ReferenceCache:
    """Open or make the cache and score the rows that it lacks; the model is loaded only then."""
    identity = replace(job.identity, backend=backend)
    store = cache.open_cache(folder, identity, create=True)
    lacking = [pair for pair in pairs if store.missing(pair.keys)]
    if not lacking:
        return store
    say(f"scoring {len(lacking)} of {len(pairs)} pairs with the reference into {folder}")
    engine = open_backend(
        backend,
        model_path=job.model_path,
        adapter_path=Path(adapter) if adapter else None,
        saes=job.saes,
        device=device,
        share_prompt=job.config.reference.share_prompt,
        trust_remote_code=job.config.reference.trust_remote_code,
    )
    for note in engine.notes:
        say(note)
    store = cache.open_cache(folder, replace(identity, dtype=engine.dtype), create=True)
    cache.fill(store, lacking, engine.score, report=progress)
    return store


def scores(store: ReferenceCache, pairs: Sequence[TokenPair]) -> list[PairScore]:
    return [
        (store.get(chosen), store.get(rejected)) for chosen, rejected in (p.keys for p in pairs)
    ]


@dataclass(frozen=True)
class PrecomputeResult:
    path: Path
    pairs: int
    rows: int
    backend: str


def precompute(
    config: RunConfig,
    *,
    output: Path | None,
    adapter: str | None = None,
    backend: str = "mlx",
    device: str | None = None,
    split: str = "all",
    say: Say,
    progress: Callable[[FillReport], None] = lambda _: None,
) -> PrecomputeResult:
    """Score every pair of the data with the frozen reference, once."""
    job = open_job(config, adapter=adapter, say=say)
    names = ("train", "valid", "test") if split == "all" else (split,)
    pairs = [
        pair
        for name in names
        if split != "all" or has_split(job, name)
        for pair in read_pairs(job, name, say)
    ]
    folder = output or default_cache(job.identity)
    store = fill_cache(
        job, pairs, folder=folder, adapter=adapter, say=say,
        backend=backend, device=device, progress=progress,
    )  # fmt: skip
    return PrecomputeResult(folder, len(pairs), len(store), backend)


def train(
    config: RunConfig,
    *,
    say: Say,
    progress: Callable[[FillReport], None] = lambda _: None,
    arm: Callable[[], Callable[[], int | None]] = lambda: lambda: None,
) -> Iterator[Report]:
    """Train adapters; yields the trainer's reports.

    arm: called when training proper begins; gives what the trainer asks whether to stop.
    """
    from fpo_mlx.checkpoint import AdapterFolder, check_resumable
    from fpo_mlx.trainer import ScoredPairs, Trainer, trainable_count

    t = config.train
    job = open_job(config, adapter=t.init_adapter, say=say)
    run = run_record(job)
    if t.resume:
        check_resumable(Path(t.adapter_path), run)
    pairs = read_pairs(job, "train", say)
    run["fingerprints"]["data"] = data.data_fingerprint(pairs)
    valid = read_pairs(job, "valid", say) if has_split(job, "valid") else []
    folder = Path(t.reference) if t.reference else default_cache(job.identity)
    store = fill_cache(
        job, [*pairs, *valid], folder=folder, adapter=t.init_adapter, say=say, progress=progress
    )
    scorer, adapter_config = open_policy(job, say=say)
    out = AdapterFolder(Path(t.adapter_path), adapter_config)
    trainer = Trainer(
        scorer,
        ScoredPairs(pairs, scores(store, pairs)),
        ScoredPairs(valid, scores(store, valid)) if valid else None,
        t,
        out,
        arm(),
    )
    trainable, total = trainable_count(scorer.policy.model)
    say(
        f"training {trainable / 1e6:.3f} M of {total / 1e6:.1f} M parameters on {len(pairs)} pairs, "
        f"{trainer.total} iterations of {t.batch_size}"
    )
    if t.resume:
        trainer.resume()
        say(f"resumed after iteration {trainer.progress.iteration}")
    else:
        out.start(run)
    yield from trainer.run()


def run_record(job: Job) -> dict[str, Any]:
    """What run.json holds: settings, versions, fingerprints. No environment, no tokens."""
    from importlib.metadata import version

    names = ("mlx", "mlx-lm", "numpy", "transformers")
    return {
        "settings": job.config.as_dict(),
        "fingerprints": {
            "model": job.identity.model,
            "adapter": job.identity.adapter,
            "tokenizer": job.identity.tokenizer,
            "saes": [list(sae) for sae in job.identity.saes],
        },
        "versions": {"fpo-mlx": __version__, "python": platform.python_version()}
        | {name: version(name) for name in names},
    }


def open_policy(job: Job, *, say: Say) -> tuple[Scorer, dict[str, Any]]:
    """The model with adapters to train and taps, and what adapter_config.json will say."""
    import mlx.core as mx

    from fpo_mlx.model import adapters
    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.scoring import Scorer, encoder_of

    t, o = job.config.train, job.config.objective
    loaded = load_model(job.model_path, trust_remote_code=job.config.reference.trust_remote_code)
    for note in loaded.notes:
        say(note)
    mx.random.seed(t.seed)
    saes = job.saes if o.pooled else ()
    sites = [sae.site for sae in saes if sae.site is not None]
    if t.init_adapter:
        spec = adapters.load(loaded.model, Path(t.init_adapter))
        say(f"starting from {t.init_adapter}; its rank, scale and layers are kept")
    else:
        spec = _new_adapters(job, loaded.model, sites, say)
        adapters.attach(loaded.model, spec)
    if adapters.unreached(sites, spec.keys, adapters.block_of(loaded.model)):
        raise ConfigError(
            "no adapted layer lies at or below the SAE's block, so the constraint would have no "
            f"gradient: the SAE reads the {sites[0]}. Adapt lower blocks (--num-layers, "
            "lora_parameters.keys), or use an SAE nearer to the output."
        )
    policy = Policy(
        loaded.model,
        loaded.config,
        sites,
        share_prompt=job.config.reference.share_prompt,
        grad_checkpoint=t.grad_checkpoint,
    )
    if job.config.reference.share_prompt and not policy.shares_prompt:
        say("this model's caches are not plain keys and values: prompts run twice a pair")
    scorer = Scorer(policy, [encoder_of(sae) for sae in saes], o)
    return scorer, spec.as_config(job.config.reference.model)


def _new_adapters(job: Job, model: Any, sites: Sequence[Site], say: Say) -> Any:
    """Fresh adapters; with a feature constraint none above the deepest tapped block."""
    from fpo_mlx.model import adapters

    t, last = job.config.train, len(model.layers) - 1
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


def evaluate(
    config: RunConfig,
    *,
    adapter_path: str | None,
    split: str = "test",
    measure_kl: bool = True,
    say: Say,
    progress: Callable[[FillReport], None] = lambda _: None,
) -> EvalReport:
    """Score a split under base + adapter against the reference. Features if an SAE is given."""
    from fpo_mlx import evaluate as evaluation
    from fpo_mlx.trainer import ScoredPairs

    t = config.train
    job = open_job(config, adapter=t.init_adapter, say=say, need_sae=False)
    pairs = read_pairs(job, split, say)
    folder = Path(t.reference) if t.reference else default_cache(job.identity)
    store = fill_cache(
        job, pairs, folder=folder, adapter=t.init_adapter, say=say, progress=progress
    )
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
    scorer = Scorer(policy, encoders, job.config.objective, measure_kl=measure_kl)
    scorer.freeze_reference(reference or None)
    return scorer


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
    from fpo_mlx import fuse as fusing

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
    from fpo_mlx import evaluate as evaluation
    from fpo_mlx.trainer import ScoredPairs

    config = replace(
        config,
        data=replace(config.data, data=verify),
        objective=replace(config.objective, constraint="none"),
    )
    job = open_job(config, adapter=None, say=say)
    split = next((s for s in ("test", "valid", "train") if has_split(job, s)), "test")
    pairs = read_pairs(job, split, say)
    store = fill_cache(job, pairs, folder=default_cache(job.identity), adapter=None, say=say)
    scored = ScoredPairs(pairs, scores(store, pairs))
    results = []
    for path, adapter in ((job.model_path, adapter_path), (fused, None)):
        scorer = open_scorer(replace(job, model_path=path), adapter, measure_kl=False, say=say)
        summary = evaluation.evaluate(scorer, scored).summary
        names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
        results.append({name: float(summary[name]) for name in names})
        del scorer
    return results[0], results[1]


def sae_info(spec: str, config: RunConfig, say: Say) -> dict[str, Any]:
    """What an SAE is, as plain values."""
    path, ref = resolve(spec, report=say), config.reference
    sae = load_sae(path, format=ref.sae_format, allow_pickle=ref.allow_pickle, name=spec)
    info = {
        "source": str(path),
        "format": sae.format,
        "activation": sae.activation,
        "d_in": sae.d_in,
        "features": sae.n_features,
        "k": sae.k,
        "site": None if sae.site is None else asdict(sae.site),
        "model": sae.model_name,
        "normalize": sae.normalize,
        "neuronpedia": sae.neuronpedia,
        "fingerprint": sae.fingerprint(),
        "notes": list(sae.notes),
    }
    if ref.model:
        at_site(sae, config, read_config(resolve_model(ref.model)), say)
        info["fits"] = ref.model
    return info
