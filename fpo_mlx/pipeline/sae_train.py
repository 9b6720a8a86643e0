"""Train a sparse autoencoder on a model's activations and write it for SAELens and `train`."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import __version__
from fpo_mlx.config import SaeTrainConfig, default_of, named, options
from fpo_mlx.errors import ConfigError
from fpo_mlx.machine import device
from fpo_mlx.pipeline import sae_finish
from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.sae_setup import (
    CALIBRATION,
    INIT,
    TRAINING_DOCUMENTS,
    Setup,
    check,
    claim,
    open_setup,
)
from fpo_mlx.pipeline.train import Stopping
from fpo_mlx.saetrain import rows
from fpo_mlx.saetrain import sizes as sizing
from fpo_mlx.storage import files, locks, outputs
from fpo_mlx.storage.runfolder import RunFolder

if TYPE_CHECKING:
    import numpy as np

    from fpo_mlx.judge.sae_fit import LossFigures
    from fpo_mlx.machine.parallel import Ranks
    from fpo_mlx.saetrain.finish import Figures
    from fpo_mlx.saetrain.state import State
    from fpo_mlx.saetrain.trainer import Plan, Report

START_ROWS = 8192  # that b_dec, scale and thresholds begin with
WARM_STEPS = 3  # of a throw-away copy, to measure speed


@dataclass(frozen=True)
class SaeTrained:
    """What was written; of several processes the first one knows the figures."""

    folder: Path
    figures: Figures | None
    loss: LossFigures | None
    tokens: int


def sae_train(
    config: SaeTrainConfig,
    *,
    say: Say,
    report: Callable[[Report], None] = lambda _: None,
    stopping: Stopping = lambda: nullcontext(lambda: lambda: None),
) -> SaeTrained:
    """The whole way: text to activations to a SAELens folder.

    stopping: ends the training after the update in work, all of it saved; what follows it is not
    held up by it.
    """
    from fpo_mlx.machine.parallel import open_ranks
    from fpo_mlx.saetrain import trainer

    folder = Path(config.output)
    check(config)
    ranks = open_ranks(count=config.batch_size, command="sae train", patience=config.peer_timeout)
    if ranks.first:
        claim(config)
    if ranks.largest(int(ranks.first and config.resume and sae_finish.is_finished(folder))):
        return _finished(config, ranks, say)
    setup = open_setup(config, ranks, say)
    with _writing(folder) if ranks.first else nullcontext():
        source, current, plan = (_resumed if config.resume else _begun)(setup, folder, say)
        rule, kept = _rule(setup), folder if ranks.first else None
        _announce(setup, plan, say)
        with device.resident(config.wired_share, ranks.size), stopping() as install_stop:
            stop = install_stop()
            for each in trainer.train(source, current, rule, plan, kept, stop, ranks):
                report(each)
            if code := ranks.largest(stop() or 0):  # it came amid the last update
                raise trainer.stopped(plan.steps, code)
        tokens = plan.steps * plan.batch
        sample = _sample(setup, source) if config.architecture == "batchtopk" else None
        del source  # and its last chunk: held-out rows come next
        made = sae_finish.write(setup, current, rule, sample, tokens, say)
        del setup, current  # a whole model comes next, and needs their room
        if made is None:
            return SaeTrained(folder, None, None, tokens)
        loss = sae_finish.measure_loss(made, trust_remote_code=config.trust_remote_code)
        return SaeTrained(folder, made.figures, loss, tokens)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """No other run writes to the folder; what a killed one left half is gone."""
    from fpo_mlx.saetrain import finish

    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(folder / finish.LOCK, folder):
        finish.sweep(folder)
        yield


def _begun(setup: Setup, folder: Path, say: Say) -> tuple[rows.Source, State, Plan]:
    """A new run in `folder`; an older one is removed once this one is known to be possible."""
    from fpo_mlx.saetrain import finish, state, trainer

    source, stored = _source(setup, say)
    sample = _sample(setup, source)
    current = state.agreed(_start(setup, sample), setup.ranks)
    plan = _plan(setup, source, current, stored, say)
    if setup.init is not None:
        trainer.warm(current, _rule(setup), plan, sample, setup.ranks)
    if setup.ranks.first:
        claim(setup.config)  # again: hours may lie between
        finish.clear(folder)
        _write_run(folder, _record(setup), plan)
    return source, current, plan


def _resumed(setup: Setup, folder: Path, say: Say) -> tuple[rows.Source, State, Plan]:
    """The run in `folder`, from its checkpoint. Raises ConfigError where this would be another."""
    from fpo_mlx.saetrain import state, trainer

    config, run = setup.config, state.run_folder(folder)
    if setup.ranks.first:
        _check_split(setup, run)
        _check_resumable(_record(setup), run)
    with setup.ranks.file_of_first(run.record) as record:
        before = files.read_object(record)
    old = before["settings"]
    _check_chunks(folder, old.get("store"), config.store)
    source, _ = _source(setup, say)
    with setup.ranks.file_of_first(folder / state.STATE) as path:
        current = state.load(path)
    plan = replace(
        trainer.Plan(**before["plan"]), micro=setup.micro, save_every=config.save_every,
        report_every=config.steps_per_report,
    )  # fmt: skip
    if setup.ranks.first:
        current.metrics_bytes = run.rewind_log(current.metrics_bytes)
    say(f"resumed after step {current.step} of {plan.steps}")
    changed = [f"--{n}" for n in ("minutes", "passes") if getattr(config, n) != old.get(n)]
    if changed:
        verb = "has" if len(changed) == 1 else "have"
        say(
            f"the run keeps its {plan.steps} updates: {' and '.join(changed)} {verb} no effect on "
            "--resume"
        )
    return source, current, plan


def _finished(config: SaeTrainConfig, ranks: Ranks, say: Say) -> SaeTrained:
    """A run that is resumed behind its end: SAE and card stay as they are, whoever edited them.

    Raises: ConfigError where the settings are another run's; model and data are not read for that.
    """
    from fpo_mlx.saetrain import state

    folder, tokens = Path(config.output), 0
    if ranks.first:
        with _writing(folder):
            run = state.run_folder(folder)
            given = dataclasses.asdict(config)
            left_open = {n for n in ("layer", "width", "k") if given[n] is None} | {"aux_k"}
            record = {"settings": given, "fingerprints": run.noted().get("fingerprints", {})}
            plan = _check_resumable(record, run, left_open)["plan"]
        tokens = plan["steps"] * plan["batch"]
        say(
            f"the run in {folder} finished before: its SAE and its card stay as they are "
            "(`fpo-mlx sae evaluate` judges the SAE)"
        )
    return SaeTrained(folder, None, None, tokens)


def _check_resumable(
    record: Mapping[str, Any], run: RunFolder, left_open: Collection[str] = ()
) -> dict[str, Any]:
    own = options((SaeTrainConfig,))
    loose = (*named("may_change", (SaeTrainConfig,)), *named("by_content", (SaeTrainConfig,)))
    defaults = {name: default_of(field) for name, field in own.items()}
    return run.check_resumable(record, {*loose, *left_open}, defaults)


def _check_split(setup: Setup, run: RunFolder) -> None:
    """Raises: ConfigError for a run that does not say what it held out, and may have otherwise.

    A version that kept no fingerprint of it held rows out one by one, whatever they share.
    """
    before = run.noted().get("fingerprints")
    if not isinstance(before, dict) or TRAINING_DOCUMENTS in before or not setup.held_out:
        return
    if before.get("data") != setup.fingerprints["data"]:
        return  # which is said
    shared = [one.prompt for one in (*setup.train, *setup.held_out) if one.prompt]
    if len(set(shared)) < len(shared):
        raise ConfigError(
            f"--resume: an older version began the run in {run.path}, without saying what it holds "
            "out. Of rows that share a prompt or first question it would be others now. Begin it "
            "anew (--overwrite in place of --resume), or end it with that version."
        )


def _check_chunks(folder: Path, before: str | None, now: str | None) -> None:
    """A place is counted in chunks, and a store is one: it can move, but not come or go."""
    if bool(before) == bool(now):
        return
    was = f"with --store {before}" if before else "without --store"
    again = f"Give --store {before} again" if before else "Leave --store out"
    raise ConfigError(
        f"--resume: the run in {folder} was started {was}, and its place in the activations is "
        f"counted in chunks, which --store changes. {again}, or start anew in another --output."
    )


def _source(setup: Setup, say: Say) -> tuple[rows.Source, bool]:
    """(activations, whether they are all there already)."""
    config = setup.config
    if config.store:
        about = {
            **{name: of for name, of in setup.fingerprints.items() if name != INIT},
            "site": str(setup.site),
        }
        array = _stored(setup, Path(config.store), about, say)
        return rows.from_array(array), True
    most = int(config.memory_gb * 1e9 / (4 * setup.hidden))
    source = rows.from_documents(
        setup.train, setup.reader.rows, rows=max(most, 1), seed=config.seed,
        least=config.batch_size,
    )  # fmt: skip
    if source.chunks > 1:
        say(
            f"the activations of one pass take more than --memory-gb {config.memory_gb:g}: they "
            f"are computed anew in {source.chunks} chunks a pass; --store FOLDER keeps them"
        )
    return source, False


def _stored(setup: Setup, folder: Path, about: dict[str, str], say: Say) -> Any:
    """Activations in `folder`, written there first if it has none."""
    ranks = setup.ranks
    there = not ranks.largest(int(not (folder / rows.STORE_ABOUT).exists()))
    if not there and not ranks.share_folder(folder):
        raise ConfigError(
            f"The processes of this run have no folder {folder} in common, which --store needs. "
            "Leave it out."
        )
    if there:
        array, found = rows.read_store(folder)
        if TRAINING_DOCUMENTS not in found:
            raise ConfigError(
                f"--store {folder}: an older version wrote it, without saying which documents it "
                "is of; some could be held out now. Remove it, and it is written again; or name "
                "another folder."
            )
        if wrong := [name for name, value in about.items() if found.get(name) != value]:
            raise ConfigError(
                f"--store {folder}: holds activations of another run ({', '.join(wrong)} differ). "
                "It fits one model, site, --data and split (--seed, --held-out). Use those of that "
                "run, name another folder, or remove it."
            )
        return array
    say(f"writing the activations of {setup.positions} positions to {folder}")
    parts = (
        setup.reader.rows(setup.train[at : at + CALIBRATION])
        for at in range(0, len(setup.train), CALIBRATION)
    )
    if ranks.first:
        rows.write_store(folder, parts, about)
    else:
        deque(parts, maxlen=0)  # its documents are run here
    ranks.largest(0)  # it is there now
    return rows.read_store(folder)[0]


def _rule(setup: Setup) -> Any:
    from fpo_mlx.core.dictionary import Rule
    from fpo_mlx.machine import device

    config, sizes = setup.config, setup.sizes
    return Rule(
        config.architecture,
        sizes.k,
        sizing.prefixes(config, sizes.width),
        bandwidth=config.bandwidth,
        aux_k=sizes.aux_k,
        sparse=device.here().sparse_decode,
    )


def _sample(setup: Setup, source: rows.Source) -> np.ndarray:
    """Rows [n, D] of the first chunk: a copy, which holds no chunk in memory."""
    import numpy as np

    first = source.chunk(0)
    order = np.random.default_rng([setup.config.seed, 5]).permutation(len(first))
    return np.array(first[np.sort(order[:START_ROWS])])


def _start(setup: Setup, sample: np.ndarray) -> State:
    from fpo_mlx.saetrain import state, warm

    if setup.init is not None:
        return warm.started(setup.init, sample, _rule(setup))
    return state.fresh(sample, _rule(setup), seed=setup.config.seed, centre=setup.config.centre)


def _plan(setup: Setup, source: rows.Source, fresh: State, stored: bool, say: Say) -> Plan:
    """The budget in updates, from tokens or from measured speed."""
    from fpo_mlx.saetrain.trainer import Plan

    config = setup.config
    tokens = config.training_tokens
    if tokens is None:
        minutes = 30.0 if config.minutes is None else config.minutes
        speed = setup.ranks.first_number(_seconds_a_token(setup, source, fresh))
        tokens = sizing.steps_in_time(
            minutes * 60,
            per_row=0.0 if stored else setup.seconds_a_row,
            per_token=speed,
            available=setup.positions,
            reused=source.chunks == 1,
        )
        say(f"{minutes:g} minutes are {tokens} tokens at {1 / speed:.0f} a second of training")
    most = int(config.passes * setup.positions)
    if tokens > most:
        say(f"--passes {config.passes:g} over {setup.positions} positions end it at {most} tokens")
    steps = max(min(tokens, most) // config.batch_size, 1)
    return Plan(
        steps=steps,
        batch=config.batch_size,
        micro=setup.micro,
        learning_rate=sizing.learning_rate(config, setup.sizes.width),
        seed=config.seed,
        dead_after=config.dead_after or max(steps // 60, 4) * config.batch_size,
        report_every=config.steps_per_report,
        save_every=config.save_every,
    )


def _seconds_a_token(setup: Setup, source: rows.Source, fresh: State) -> float:
    """Training speed, measured on a copy that is thrown away."""
    from fpo_mlx.saetrain import trainer

    config, copy = setup.config, replace(fresh, unused=fresh.unused.copy())
    plan = trainer.Plan(
        WARM_STEPS, config.batch_size, setup.micro, 1e-3, config.seed, 1 << 40,
        report_every=1,
    )  # fmt: skip
    reports = trainer.train(source, copy, _rule(setup), plan, ranks=setup.ranks)
    speeds = [report.tokens_per_second for report in reports]
    return 1 / max(speeds)


def _announce(setup: Setup, plan: Plan, say: Say) -> None:
    config = setup.config
    say(
        f"{config.architecture} of {setup.sizes.width} features, k {setup.sizes.k}, on the "
        f"{setup.site}: {plan.steps} updates of {plan.batch} tokens"
    )
    if setup.ranks.size > 1 and config.architecture == "batchtopk":
        say(
            f"batch top-k chooses among the {plan.micro} tokens of a micro-batch: one process "
            f"trains the same SAE with --micro-batch-size {plan.micro}"
        )


def _record(setup: Setup) -> dict[str, Any]:
    """What run.json holds beside the plan. No environment, no tokens."""
    sizes = dataclasses.asdict(setup.sizes)
    return {
        "settings": outputs.of_the_run(dataclasses.asdict(setup.config)) | sizes,
        "fingerprints": setup.fingerprints,
        "versions": {"fpo-mlx": __version__},
    }


def _write_run(folder: Path, run: dict[str, Any], plan: Plan) -> None:
    from fpo_mlx.saetrain import state

    state.run_folder(folder).write_record(run | {"plan": dataclasses.asdict(plan)})
