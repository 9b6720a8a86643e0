"""Train adapters against a cached reference."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import __version__, data
from fpo_mlx.cache import ReferenceCache
from fpo_mlx.config import RunConfig
from fpo_mlx.data.feature_files import weights_fingerprint
from fpo_mlx.data.folders import Unclear
from fpo_mlx.errors import CacheMismatch, ConfigError
from fpo_mlx.intervals import share_to_hold
from fpo_mlx.machine import device
from fpo_mlx.machine.processes import find_share
from fpo_mlx.pipeline.job import Job, Say, has_split, open_job
from fpo_mlx.pipeline.plan import predicted_peak
from fpo_mlx.pipeline.policy import Outline, open_policy, outline_of
from fpo_mlx.pipeline.prepared import hub_splits, read_splits
from fpo_mlx.pipeline.store import CachedScores, OnFill, reference_of
from fpo_mlx.records import PAIRS_FILE, TokenPair
from fpo_mlx.storage import files, outputs

if TYPE_CHECKING:
    from fpo_mlx.machine.parallel import Ranks
    from fpo_mlx.train.checkpoint import Folder
    from fpo_mlx.train.events import Report
    from fpo_mlx.train.order import Order
    from fpo_mlx.train.trainer import Trainer

RUN = outputs.Made(
    "a run",
    r"(\d{7,}_)?adapters\.safetensors|adapter_config\.json|run\.json|metrics\.jsonl|"
    r"chat_template\.jinja|checkpoint/|best/|tensorboard/",
    mark="run.json",
    ways="--resume goes on with it; ",
)
NOTED = ("source", "splits", "iterations")  # of run.json, again when a run goes on

Stop = Callable[[], int | None]  # asked between updates: None, or the exit code to stop with
InstallStop = Callable[[], Stop]  # called when updates begin: signals end a run from then on
# entered around a training: what installs its stop, and is gone again behind it
Stopping = Callable[[], AbstractContextManager[InstallStop]]


def train(
    config: RunConfig,
    *,
    say: Say,
    progress: OnFill = lambda _: None,
    install_stop: InstallStop = lambda: lambda: None,
    begin: Callable[[int], None] = lambda _: None,
) -> Iterator[Report]:
    """Train adapters; yields the trainer's reports.

    begin: called with the number of iterations before the first one; install_stop: called when
    training proper begins.
    """
    processes = find_share(os.environ).world
    with device.resident(config.reference.wired_share, processes):
        yield from _train(config, say, progress, install_stop, begin)


def _train(
    config: RunConfig,
    say: Say,
    progress: OnFill,
    install_stop: InstallStop,
    begin: Callable[[int], None],
) -> Iterator[Report]:
    ready = _make_ready(config, install_stop, say, progress)
    if ready is None:
        return
    trainer, out = ready.trainer, ready.out
    begin(trainer.total)
    _announce(trainer, say)
    if "model" in ready.store.differences:
        _compare_weights(trainer, ready.store, say)
    with out.writing():
        if config.train.resume:
            told = trainer.resume()
            out.resumed(ready.record, trainer.progress.iteration)
            # the same pairs may lie elsewhere now
            out.note({name: ready.record[name] for name in NOTED})
            for line in (f"resumed after iteration {trainer.progress.iteration}", *told):
                say(line)
        else:
            if trainer.ranks.first:  # again: hours may lie between
                claim_place(config)
            out.start(ready.record, ready.template)
        begun = trainer.progress.iteration
        yield from trainer.run()
        if trainer.ranks.first and trainer.progress.iteration > begun:
            _compare_peaks(out, ready.predicted, say)


@dataclass(frozen=True)
class _Ready:
    """A run whose long parts begin. record: for run.json; predicted: bytes at the peak."""

    trainer: Trainer
    out: Folder
    store: ReferenceCache
    record: dict[str, Any]
    template: str | None
    predicted: float


def _make_ready(
    config: RunConfig, install_stop: InstallStop, say: Say, progress: OnFill
) -> _Ready | None:
    """Everything that can be refused is refused before the reference runs.

    None: the run that was to go on is at its end, which was said.
    """
    from fpo_mlx.train.checkpoint import AdapterFolder, NoFolder, check_resumable
    from fpo_mlx.train.metrics import ScoredPairs
    from fpo_mlx.train.optimizer import make_optimizer
    from fpo_mlx.train.order import Order
    from fpo_mlx.train.trainer import Trainer

    t, place = config.train, Path(config.train.adapter_path)
    make_optimizer(t)
    ranks = _claim_among(config)
    job = open_job(config, say=say, projected=True)
    splits = read_splits(config, job.tokenizer, _splits(job), say, doctor=True)
    pairs, valid = splits["train"], splits.get("valid", [])
    if t.val_batches and "valid" not in splits:
        say(_of_none_held(job, len(pairs)))
    record = run_record(job, data.data_fingerprint(pairs), data.data_fingerprint(valid))
    record["splits"] = _sizes(job, splits)
    if t.resume and ranks.first:
        check_resumable(place, record)
    order = Order(pairs, t)
    record["iterations"] = order.total
    if t.resume and _at_its_end(config, order, len(valid), ranks, say):
        return None
    outline = outline_of(job, say)  # refuses adapters out of reach
    predicted = _predict(job, pairs, outline, say)
    agree = _agreement(ranks)
    looks = _looked_at(order, len(valid), say)
    wanted = [part[i] for part, some in zip((pairs, valid), looks, strict=True) for i in some]
    store = reference_of(job, wanted, say, progress, other_weights=True, agree=agree)
    scorer, adapter_config = open_policy(job, outline.spec, say=say)
    scorer.half |= store.half
    out = AdapterFolder(place, adapter_config) if ranks.first else NoFolder(place)
    scored, held_out = (
        ScoredPairs(part, CachedScores(store, part, some))
        for part, some in zip((pairs, valid), looks, strict=True)
    )
    trainer = Trainer(
        scorer, scored, held_out if valid else None, t, out, install_stop(), ranks, order
    )  # fmt: skip
    template = job.tokenizer.templates["default"] if config.data.chat_template else None
    return _Ready(trainer, out, store, record, template, predicted)


def _at_its_end(config: RunConfig, order: Order, valid: int, ranks: Ranks, say: Say) -> bool:
    """Whether a run that is to go on has nothing left to do; its user is told.

    Raises: ConfigError where it has done more than is wanted.
    """
    from fpo_mlx.train.checkpoint import AdapterFolder, saved_progress
    from fpo_mlx.train.drift import Controller
    from fpo_mlx.train.landing import hindrance

    t, done = config.train, False
    if ranks.first:
        place = Path(t.adapter_path)
        with AdapterFolder(place, {}).writing():  # nobody else is; and what a kill left goes
            progress = saved_progress(place)
        at = t.whole_updates(progress.iteration)  # an older version may have cut the last one short
        asked = "--epochs" if t.epochs is not None else "--iters"
        text = (
            f"--resume: the run in {t.adapter_path} is at iteration {at} already, and {asked} "
            f"counts from the start, to {order.total}: --iters {at + 100} trains 100 more"
        )
        if at > order.total:
            raise ConfigError(f"{text}.")
        steered = Controller.of(config.objective) is not None
        lands = steered and t.land and hindrance(t, t.validated(valid)) is None
        done = at == order.total and (progress.landed if lands else not progress.landed)
        if done:
            say(text)
    return bool(ranks.largest(int(done)))


def _claim_among(config: RunConfig) -> Ranks:
    """This process among those of the run, of which the first one claims its folder."""
    from fpo_mlx.machine.parallel import open_ranks

    ranks = open_ranks(
        count=config.train.pairs_per_update,
        what="--batch-size times --grad-accumulation-steps",
        patience=config.train.peer_timeout,
    )
    if ranks.first:
        claim_place(config)
    return ranks


def _predict(job: Job, pairs: Sequence[TokenPair], outline: Outline, say: Say) -> float:
    """Bytes at the peak; said, and so is what this machine lacks of them."""
    predicted, shortage = predicted_peak(job, pairs, outline)
    say(f"predicted peak memory of training: {predicted / 1e9:.2f} GB")
    if shortage:
        say(f"warning: {shortage}")
    return predicted


def _sizes(job: Job, read: Mapping[str, Sequence[TokenPair]]) -> dict[str, int | None]:
    """How many pairs each split of the data has; None for one that the run does not read."""
    found = data.find_splits(job.config.data.data, hub_splits(job.config))
    others = [name for name in found if name not in read and not isinstance(found[name], Unclear)]
    return {name: len(read[name]) if name in read else None for name in (*read, *others)}


def _looked_at(order: Order, valid: int, say: Say) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation pairs whose scores the run reads.

    Up to its last iteration: of a large data set that may be a small part. A run that is resumed
    with more of them has the others scored then. valid: how many validation pairs there are.
    """
    from fpo_mlx.train.trainer import START_PAIRS

    seen, count = set(order.visited().tolist()), len(order.pairs)
    if order.config.reference:  # it may be of other weights, which are compared on the first pairs
        seen.update(range(min(START_PAIRS, count)))
    held = order.config.validated(valid)
    if len(seen) < count or held < valid:
        of_valid = f" and {held} of {valid} validation pairs" if valid else ""
        say(
            f"this run needs the reference's scores of {len(seen)} of {count} training pairs"
            f"{of_valid}, and of no others (`fpo-mlx precompute` scores all)"
        )
    return sorted(seen), list(range(held))


def _splits(job: Job) -> tuple[str, ...]:
    """What is read; validation pairs only where there are some and they are wanted.

    Raises: ConfigError where they are needed and cannot be had.
    """
    t, source = job.config.train, job.config.data.data
    if t.val_batches and has_split(job, "valid"):
        return "train", "valid"
    if t.early_stopping:
        raise ConfigError(
            f"--early-stopping {t.early_stopping}: found no validation pairs in {source}, or "
            "--val-batches is 0. Hold prompts back (--valid-share), add a valid.jsonl (or "
            "--valid-split of a hub data set), or drop the setting."
        )
    return ("train",)


def _of_none_held(job: Job, pairs: int) -> str:
    share = share_to_hold(pairs)
    return (
        f"no validation pairs in {job.config.data.data}, so nothing is held out: all figures will "
        f"be of pairs that are trained on. --valid-share {share:g} holds about "
        f"{share * pairs:.0f} of the {pairs} pairs back"
        + ("; or --valid-split test, which is then no test" if has_split(job, "test") else "")
    )


def claim_place(config: RunConfig) -> None:
    """Raises: ConfigError where the run would write over anything but itself."""
    from fpo_mlx.train.checkpoint import run_folder

    t, flag, inputs = config.train, "--adapter-path", config.reads()
    run = run_folder(Path(t.adapter_path))
    run.check_own()
    if t.resume:
        outputs.refuse_inputs(Path(t.adapter_path), flag, inputs, RUN)
        outputs.refuse_links(Path(t.adapter_path), flag, RUN)
    else:
        made, anew = run.as_made(RUN), t.overwrite
        outputs.claim_folder(t.adapter_path, flag, made, inputs=inputs, overwrite=anew)


def _compare_peaks(out: Folder, predicted: float, say: Say) -> None:
    """Say what `plan` predicted and what MLX measured, and keep both in run.json."""
    import mlx.core as mx

    measured, kept = mx.get_peak_memory(), device.here().cache_limit or 0
    more = f", beside {kept / 1e9:.2f} GB of freed buffers" if kept else ""
    say(f"peak memory {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB{more}")
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
    from fpo_mlx.train import guard

    old, new = store.differences["model"]
    (gap, apart), bound = trainer.start_gaps(), trainer.config.max_start_gap
    bound *= guard.HALF_WIDER if trainer.scorer.half else 1.0
    found = (
        f"{store.folder} was made with other weights than this run's (model: cache {old}, this "
        f"run {new}). At step 0 |u| / beta is up to {gap:.3g} nats per token, and log-probs differ "
        f"by up to {apart:.3g} nats per token"
    )
    if max(gap, apart) <= bound:
        say(f"warning: {found}")
        return
    raise CacheMismatch(
        f"{found}, over --max-start-gap {bound:g}. Run `fpo-mlx precompute` with this run's model, "
        "or raise --max-start-gap if another reference is what you want."
    )


def _announce(trainer: Trainer, say: Say) -> None:
    from fpo_mlx.train import foresight, landing
    from fpo_mlx.train.optimizer import trainable_count

    trainable, total = trainable_count(trainer.model)
    t = trainer.config
    if t.iters is not None and t.iters != trainer.total:
        say(
            f"--iters {t.iters}: {trainer.total} are done, whole updates of "
            f"--grad-accumulation-steps {t.grad_accumulation_steps}"
        )
    passes = trainer.order.passes
    say(
        f"training {trainable / 1e6:.3f} M of {total / 1e6:.1f} M parameters on "
        f"{len(trainer.train)} pairs, {trainer.total} iterations of {t.batch_size} = "
        f"{passes:.3g} pass{'' if passes == 1 else 'es'}"
    )
    for warning in foresight.warnings(trainer.order):
        say(f"warning: {warning}")
    if trainer.drift is not None and t.land:
        why = landing.hindrance(t, trainer.validation_pairs)
        if why is not None:
            say(f"no landing on the target at the end: {why}")


def _source(source: str | None) -> dict[str, str | None]:
    """Where the pairs lie, from wherever it is asked, and sha256 of the pairs.json beside them.

    Empty for a data set of the hub. No setting: a run goes on where its data has moved.
    """
    place = Path(source or "").expanduser()
    if not source or not place.exists():
        return {}
    return {"data": str(place.resolve()), "pairs": files.known_digest(place / PAIRS_FILE)}


def run_record(job: Job, data_fingerprint: str, valid: str) -> dict[str, Any]:
    """What run.json holds: settings, versions, fingerprints. No environment, no tokens."""
    from importlib.metadata import version

    names = ("mlx", "mlx-lm", "numpy", "transformers")
    return {
        "source": _source(job.config.data.data),
        "settings": outputs.of_the_run(job.config.as_dict()),
        "fingerprints": {
            "model": job.identity.model,
            "adapter": job.identity.adapter,
            "tokenizer": job.identity.tokenizer,
            "data": data_fingerprint,
            "valid": valid,
            "saes": [list(sae) for sae in job.identity.saes],
            "named_features": weights_fingerprint(job.feature_weights),
            "projected": job.identity.projected,
        },
        "versions": {"fpo-mlx": __version__, "python": platform.python_version()}
        | {name: version(name) for name in names},
    }
