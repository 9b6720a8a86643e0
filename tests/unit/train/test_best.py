"""What a validation prefers: the preference, and never that the chosen answers' features moved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, open_trainer, random_pairs  # noqa: E402

from fpo_mlx.train.checkpoint import STATE  # noqa: E402
from fpo_mlx.train.events import StepReport, StoppedReport, ValidReport  # noqa: E402
from fpo_mlx.train.metrics import measure  # noqa: E402

PAIRS = random_pairs(SIZES)
HELD = {"fpo": {"alpha": 40.0}, "tdpo1": {"alpha": 40.0}, "tdpo2": {"alpha": 40.0}}
OLD = {"fpo": {}, "tdpo2": {}, "dpo": {}, "a target": {"target_drift": 0.3}, "no alpha": {}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"))


def open_run(llama, out, **changes):
    settings = {"iters": 4, "steps_per_eval": 2, "val_batches": -1, "learning_rate": 1e-3}
    return open_trainer(llama, out, PAIRS[:4], valid=PAIRS[4:], **{**settings, **changes})


@pytest.mark.parametrize("preset", HELD)
def test_a_validation_leaves_the_constraint_out_and_training_keeps_it(llama, tmp_path, preset):
    """u without alpha is beta times what the chosen response gained more, and no distance."""
    trainer = open_run(llama, tmp_path, preset=preset, objective=HELD[preset])
    o, looks = trainer.scorer.objective, 0
    for report in trainer.run():
        assert trainer.scorer.alpha == o.alpha
        if isinstance(report, ValidReport):
            values = measure(trainer.scorer, trainer.valid)
            ratio = values["rewards/chosen"] - values["rewards/rejected"]
            want = np.log1p(np.exp(-ratio)).mean()
            assert report.loss == pytest.approx(want, rel=1e-5)
            held = values["loss"].mean()
            looks += abs(held - want) > 1e-3  # else the test says nothing
        elif isinstance(report, StepReport) and report.iteration > 1:
            margin = report.metrics["rewards/margins"]
            assert abs(report.loss - np.log1p(np.exp(-margin))) > 1e-4
    assert looks


def test_a_validation_says_how_many_pairs_of_different_prompts_tell_as_much(llama, tmp_path):
    alike = [replace(pair, prompt=PAIRS[4].prompt) for pair in PAIRS[4:]]
    for name, valid, want in (("other", PAIRS[4:], len(alike)), ("alike", alike, 1)):
        trainer = open_trainer(llama, tmp_path / name, PAIRS[:4], valid=valid, iters=1)
        first = next(r for r in trainer.run() if isinstance(r, ValidReport))
        assert first.witnesses == want, "of a model that no update moved no pair is right"


def test_a_look_that_fails_leaves_training_its_alpha(llama, tmp_path, monkeypatch):
    trainer = open_run(llama, tmp_path)

    def fails(*_):
        assert trainer.scorer.alpha == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_measure", fails)
    with pytest.raises(KeyboardInterrupt):
        list(trainer.run())
    assert trainer.scorer.alpha == trainer.scorer.objective.alpha == 0.5


def older(path) -> None:
    """The state as a version wrote it that judged with alpha: it does not say by what rule."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    progress = json.loads(metadata["progress"])
    del progress["judged_by"]
    progress["best_loss"] = -1.0  # no preference loss is as low
    mx.save_safetensors(str(path), arrays, metadata={"progress": json.dumps(progress)})


@pytest.mark.parametrize("name", OLD)
def test_an_older_runs_best_counts_where_it_was_judged_without_the_constraint(
    llama, tmp_path, name
):
    preset = name if name in ("tdpo2", "dpo") else "fpo"
    objective = {"alpha": 0.0} if name == "no alpha" else OLD[name]
    changes = {"preset": preset, "objective": objective, "land": False}
    list(open_run(llama, tmp_path, **changes).run())
    older(tmp_path / STATE)
    again = open_run(llama, tmp_path, start=False, **{**changes, "iters": 6})
    told = again.resume()
    (report,) = [r for r in again.run() if isinstance(r, ValidReport)]
    if name in ("fpo", "tdpo2"):
        assert "judged with the constraint" in " ".join(told)
        assert report.best
        assert again.progress.best_iteration == 6
    else:
        assert told == ()
        assert not report.best
        assert again.progress.best_loss == -1.0


def test_an_older_run_that_had_stopped_early_goes_on_and_a_new_one_stays(llama, tmp_path):
    """The validations that ended the older one had preferred what drifted."""
    changes = {"iters": 30, "steps_per_eval": 1, "early_stopping": 2, "learning_rate": 1e-8}
    (*_, stopped) = open_run(llama, tmp_path, **changes).run()
    assert isinstance(stopped, StoppedReport)
    again = open_run(llama, tmp_path, start=False, **changes)
    assert again.resume() == ()
    assert list(again.run()) == [stopped]
    older(tmp_path / STATE)
    again = open_run(llama, tmp_path, start=False, **changes)
    assert len(again.resume()) == 1
    reports = list(again.run())
    assert [r.best for r in reports if isinstance(r, ValidReport)][0]
