"""The one training loop, for every objective. It yields what happened; the caller shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn, cast

import mlx.core as mx
import numpy as np

from fpo_mlx.config import TrainConfig
from fpo_mlx.errors import Diverged, ModelError
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.model import adapters, randomness
from fpo_mlx.train import guard, landing
from fpo_mlx.train.checkpoint import STATE, Folder, Progress, interrupted, load_state
from fpo_mlx.train.drift import Controller
from fpo_mlx.train.events import (
    LandedReport,
    Report,
    SavedReport,
    SkippedReport,
    StepReport,
    StoppedReport,
    ValidReport,
)
from fpo_mlx.train.gradients import GRADIENTS, Ground
from fpo_mlx.train.metrics import ScoredPairs, Window, means_of, measure, shown, witnesses_of
from fpo_mlx.train.optimizer import gradient_norm, make_optimizer, make_update, part_way
from fpo_mlx.train.order import Order
from fpo_mlx.train.scoring import Scorer

START_PAIRS = 16  # first pairs that a policy is compared on with a reference of other weights


class Trainer:
    """Updates the adapters of `scorer.policy.model`; everything it needs is handed to it."""

    def __init__(
        self,
        scorer: Scorer,
        train: ScoredPairs,
        valid: ScoredPairs | None,
        config: TrainConfig,
        folder: Folder,
        stop: Callable[[], int | None] = lambda: None,
        ranks: Ranks | None = None,
        order: Order | None = None,
    ) -> None:
        """stop: asked between updates; an exit code (130, 143) saves the state and ends the run.

        ranks: the processes among which the pairs of every update are dealt out; default one.
        order: of the training pairs, where it is known already.
        """
        self.scorer, self.train, self.valid = scorer, train, valid
        self.config, self.folder, self._stop = config, folder, stop
        self.ranks = ranks or Ranks()
        self.model = scorer.policy.model
        self.order = order or Order(train.pairs, config)
        self.total = self.order.total
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.model.trainable_parameters())
        self._update = make_update(self.optimizer, config.max_grad_norm or 0.0)
        self.progress = Progress()
        self._window = Window()
        self._validated: dict[str, np.ndarray] = {}  # what the last validation measured
        self._steer(Controller.of(scorer.objective))
        self._good: dict[str, mx.array] = {}  # adapters that the guard let pass; {} before any

    def resume(self) -> tuple[str, ...]:
        """Go back to the state in the folder. Returns: what its user should know."""
        with self.ranks.file_of_first(self.folder.path / STATE) as path:
            loaded = load_state(path, self.model, self.optimizer)
        self.progress, reference, self._good = loaded
        # an older version may have cut the last update short
        self.progress.iteration = self.config.whole_updates(self.progress.iteration)
        self.scorer.freeze_reference(reference)
        saved, objective = self.progress.drift, self.scorer.objective
        self._steer(Controller.loaded(saved, objective) if saved else None)
        self.folder.rewind_log(self.progress)
        self._window = Window(**self.progress.window)
        return self.progress.rejudged(objective)

    def start_gaps(self) -> tuple[float, float]:
        """`guard.gaps` of the first pairs, before any update."""
        self.model.eval()
        some = self.train.take(range(min(START_PAIRS, len(self.train))))
        return guard.gaps(self._measure(some), some.refs, self.scorer.objective)

    def run(self) -> Iterator[Report]:
        """Train to the last iteration, or until validation finds nothing better.

        Raises: Diverged, Interrupted (after saving), ModelError when step 0 shows that policy and
        reference are not the same model.
        """
        mx.reset_peak_memory()
        if self.progress.iteration == 0:
            # another machine than the first process's may have drawn other numbers
            self.model.update(self.ranks.from_first(self.model.trainable_parameters()))
            self.scorer.freeze_reference()
            if self.valid:
                yield self._validate()
        self._window.started = time.perf_counter()
        if guard.stale(self.progress.stale, self.config):  # a run that had ended is resumed
            yield from self._land()
            yield self._stopped()
            return
        if self.progress.iteration >= self.total:
            yield from self._land()
        for iteration, skipped in self._updates():
            last = iteration >= self.total
            if skipped is not None:
                yield skipped
            report = last or self.config.crossed(self.config.steps_per_report, iteration)
            if report and self._window.pairs:  # else all of them were left out
                yield self._report(iteration)
            if self.valid and (last or self.config.crossed(self.config.steps_per_eval, iteration)):
                yield self._validate()
            early = not last and guard.stale(self.progress.stale, self.config)
            last = last or early
            code = self.ranks.largest(self._stop() or 0)
            due = self.config.crossed(self.config.save_every, iteration)
            if code or last or due:
                self._save(numbered=last or due)
                yield SavedReport(iteration, numbered=last or due)
            if last:
                yield from self._land()
            if early:
                yield self._stopped()
                return
            if code and not last:
                self.ranks.largest(0)  # it is saved: a launcher ends all when one of them ends
                raise interrupted(iteration, self.folder.path, self.config, code)

    @property
    def _step(self) -> int:
        return self.config.grad_accumulation_steps

    def _updates(self) -> Iterator[tuple[int, SkippedReport | None]]:
        """One optimizer update each: (iterations done, whether it was left out)."""
        progress, config = self.progress, self.config
        order = self.order.updates(progress.iteration // self._step)
        while progress.iteration < self.total:
            indices = next(order)
            self._seed_dropout()
            self.model.train()
            values, gradient = self._gradient(indices)
            self.model.eval()
            norm = gradient_norm(gradient)
            grad_norm = cast(float, norm.item())
            if progress.iteration == 0:
                self._window.notes += self._check_first(indices, values, grad_norm)
            chosen_tokens = np.array([len(self.train.pairs[i].chosen) for i in indices])
            trouble = guard.divergence(
                values, chosen_tokens, grad_norm, config, self.scorer.objective
            )
            trouble = trouble or self._apply(gradient, norm)
            del gradient, norm  # else they are there beside the next pass's
            iteration = progress.iteration + self._step
            skipped = self._skip(iteration, trouble) if trouble else None
            progress.iteration, progress.landed = iteration, False
            if skipped is None:
                tokens = sum(self.train.pairs[i].tokens for i in indices)
                self._window.add(values, tokens, grad_norm)
                progress.skipped_in_a_row = 0
                if self.drift is not None:
                    self._drifted(self.drift, values)
                progress.pairs += len(indices)
                progress.tokens += tokens
            yield progress.iteration, skipped

    def _steer(self, drift: Controller | None) -> None:
        """Take alpha from the controller."""
        self.drift = drift
        if drift is not None:
            self.scorer.alpha = drift.alpha
            self.scorer.largest_pull = drift.largest_pull(self.config.max_margin)

    def _drifted(self, drift: Controller, values: dict[str, np.ndarray]) -> None:
        """Tell the controller what an update's pairs measured, and the user what it had to do."""
        figure = Controller.figure(self.scorer.objective)
        after = drift.after(float(values[figure].mean()))
        self._steer(after)
        if after.told and not drift.told:
            self._window.notes.append(guard.short_steps(self.scorer.objective, self.config))

    def _gradient(self, indices: np.ndarray) -> tuple[dict[str, np.ndarray], Any]:
        """Mean gradient over the pairs, and their values in order: the same on every process."""
        ground = Ground(self.scorer, self.train, self.config, self.ranks)
        update = self.progress.iteration // self._step
        return GRADIENTS[self.config.gradient](ground, indices, update)

    def _measure(self, data: ScoredPairs, first: int | None = None) -> dict[str, np.ndarray]:
        """`measure` of all pairs (of the first few), each by one of the processes."""
        count = len(data) if first is None else first
        own = self.ranks.part(count)
        values = measure(self.scorer, data, self.config.micro_batch_size, own.positions.tolist())
        return self.ranks.gather(values, own, count)

    def _seed_dropout(self) -> None:
        """Of several processes each drops on its own, and on again from any checkpoint."""
        if self.ranks.size > 1:
            randomness.go_to_own(self.config.seed, self.progress.iteration, self.ranks.rank)

    def _apply(self, gradient: Any, norm: mx.array) -> guard.Trouble | None:
        """Update the adapters, unless that makes one of them infinite: then the trouble."""
        self._good = dict(adapters.parameters(self.model))  # the guard let them pass
        before = self.optimizer.state
        parameters = self.model.trainable_parameters()
        updated = self._update(gradient, norm, parameters)
        if self.drift is not None and self.drift.part < 1.0:
            updated = part_way(parameters, updated, mx.array(self.drift.part))
        self.model.update(updated)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        if guard.all_finite(dict(adapters.parameters(self.model)).values()):
            return None
        adapters.update(self.model, self._good)
        self.optimizer.state = before
        remedy = guard.against_infinity(self.config)
        return guard.Trouble("the update made the adapters infinite", remedy)

    def _skip(self, iteration: int, trouble: guard.Trouble) -> SkippedReport:
        """Leave an update out and count it; Diverged where that is not wanted, or no way on."""
        progress = self.progress
        in_a_row = progress.skipped_in_a_row + 1
        if progress.iteration == 0 or guard.too_many(in_a_row, self.config):
            row = f" ({in_a_row} updates in a row were left out)" if in_a_row > 1 else ""
            self._diverge(iteration, guard.Trouble(trouble.what + row, trouble.remedy))
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, in_a_row
        report = SkippedReport(iteration, trouble.what, in_a_row)
        self._log("skipped", report)
        return report

    def _check_first(
        self, indices: np.ndarray, seen: dict[str, np.ndarray], grad_norm: float
    ) -> list[str]:
        """Before the first update policy and reference are one model; see that they are.

        seen: what the pass with gradient gave for the same pairs.
        Returns: warnings. Raises: ModelError.
        """
        first = self.train.take(indices)
        o, bound = self.scorer.objective, self.config.max_start_gap
        half = self.scorer.half
        verdict = guard.first_step(self._measure(first), first.refs, grad_norm, o, bound, half=half)
        if verdict.reason is not None:
            raise ModelError(verdict.reason)
        rounded = half and not randomness.drops(self.model, now=False)
        dtype = str(self.scorer.policy.dtype).split(".")[-1]
        noise = guard.noise(seen, first.refs, o, dtype) if rounded else None
        parted = guard.parted_twins(self.config) if self.order.twins is not None else None
        more = (noise, guard.one_length(grad_norm, self.config, o), parted)
        return [*verdict.notes, *(note for note in more if note)]

    def _diverge(self, iteration: int, trouble: guard.Trouble) -> NoReturn:
        """End the run with the adapters from before the trouble; the last checkpoint stays."""
        path, best = self.folder.path, self.folder.path / "best"
        kept = "Nothing was trained yet, so no adapters were written"
        if self._good and guard.all_finite(self._good.values()):
            adapters.update(self.model, self._good)
            self.folder.save_adapters(self.model)
            kept = f"The adapters from before it are in {path}"
        if best.is_dir():
            kept += f", the best validated ones in {best}"
        raise Diverged(f"iteration {iteration}: {trouble.what}. {kept}. {trouble.remedy}.")

    def _report(self, iteration: int) -> StepReport:
        window, self._window = self._window, Window()
        seconds, means = window.elapsed(), window.means()
        if self.valid is None:  # else a validation says it, of more pairs
            window.notes += self._fallen(means)
        report = StepReport(
            iteration=iteration,
            loss=means.pop("loss"),
            metrics=shown(means),
            learning_rate=cast(float, self.optimizer.learning_rate.item()),
            grad_norm=window.grad_norm,
            pairs=self.progress.pairs,
            tokens_per_second=window.tokens / seconds,
            pairs_per_second=window.pairs / seconds,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            skipped=self.progress.skipped,
            alpha=None if self.drift is None else self.drift.alpha,
            part=None if self.drift is None else self.drift.part,
            warnings=tuple(window.notes),
        )
        self._log("train", report)
        return report

    def _fallen(self, means: Mapping[str, float]) -> tuple[str, ...]:
        return self.progress.once(guard.fallen(means, self.config, self.scorer.objective))

    @property
    def validation_pairs(self) -> int:
        """How many a validation looks at."""
        return self.config.validated(0 if self.valid is None else len(self.valid))

    def _looked(self) -> dict[str, np.ndarray]:
        """The adapters as they stand, on the validation pairs, by the preference alone.

        The constraint's part of u grows where the chosen responses move: it would prefer drift.
        """
        assert self.valid is not None
        alpha, self.scorer.alpha = self.scorer.alpha, 0.0
        try:
            return self._measure(self.valid, self.validation_pairs)
        finally:
            self.scorer.alpha = alpha

    def _validate(self) -> ValidReport:
        assert self.valid is not None
        started, n = time.perf_counter(), self.validation_pairs
        values = self._validated = self._looked()
        means = means_of(values)
        loss, progress = means.pop("loss"), self.progress
        if not math.isfinite(loss):
            remedy = guard.against_infinity(self.config)
            trouble = guard.Trouble("the validation loss is not finite", remedy)
            self._diverge(progress.iteration, trouble)
        best = progress.best_loss is None or loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_iteration = loss, progress.iteration
            progress.stale = 0
            self.folder.save_best(self.model)
        else:
            progress.stale += 1
        seconds = time.perf_counter() - started
        self._window.started += seconds  # speed is that of training
        said = self._fallen(means)
        tell = witnesses_of(values, self.valid.pairs)
        report = ValidReport(progress.iteration, loss, means, n, seconds, best, said, tell)
        self._log("valid", report)
        return report

    def _land(self) -> Iterator[LandedReport]:
        """Save the part of the change that has the target on the pairs that validation looks at.

        Nothing where there is no target, something is in its way, no need, or it was done.
        """
        drift, progress = self.drift, self.progress
        if progress.landed and not self.config.land:  # --resume --no-land takes it back
            progress.landed = False
            self._save(numbered=False)
        if drift is None or progress.landed or not self.config.land or self.valid is None:
            return
        if landing.hindrance(self.config, self.validation_pairs):
            return
        started = time.perf_counter()
        self.model.eval()  # of a resumed run none was updated yet
        whole = self._validated or self._looked()
        figure = Controller.figure(self.scorer.objective)
        found = landing.land(
            self.model, self.scorer.reference, self._held, whole, figure=figure, target=drift.target
        )
        progress.landed = True
        seconds = time.perf_counter() - started
        self._window.started += seconds  # speed is that of training
        if found is not None:
            self.folder.save_part(found.weights)
            report = found.report(progress.iteration, figure, drift.target, whole, seconds)
            report = replace(report, witnesses=witnesses_of(found.values, self.valid.pairs))
            self._log("landed", report)
            yield report
        self._save_state()

    def _held(self, part: float) -> dict[str, np.ndarray] | None:
        """`_looked`, unless more than the whole is where the guard would end a run."""
        assert self.valid is not None
        values = self._looked()
        if part <= 1:
            return values
        tokens = np.array([len(p.chosen) for p in self.valid.pairs[: len(values["loss"])]])
        trouble = guard.divergence(values, tokens, 0.0, self.config, self.scorer.objective)
        return None if trouble else values

    def _stopped(self) -> StoppedReport:
        progress = self.progress
        assert progress.best_loss is not None
        return StoppedReport(
            progress.iteration, progress.stale, progress.best_iteration, progress.best_loss
        )

    def _save(self, *, numbered: bool) -> None:
        self.folder.save_adapters(self.model, self.progress.iteration if numbered else None)
        self._save_state()

    def _save_state(self) -> None:
        self.progress.window = self._window.saved()
        self.progress.drift = {} if self.drift is None else self.drift.saved()
        self.folder.save_state(
            self.model, self.optimizer, self.scorer.reference, self._good, self.progress
        )

    def _log(self, kind: str, report: Report) -> None:
        self.folder.log({"kind": kind, **asdict(report)}, self.progress)
