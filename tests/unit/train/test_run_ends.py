"""How a run ends before its last iteration, or goes on where it might have ended."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, log_of, open_trainer, random_pairs, weights  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from fpo_mlx.errors import Diverged, Interrupted, ModelError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.train.events import (  # noqa: E402
    SavedReport,
    SkippedReport,
    StepReport,
    StoppedReport,
    ValidReport,
)

PAIRS = random_pairs(SIZES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


# Early stopping -----------------------------------------------------------------------------------

OVERSHOOT = {  # so that the validation loss rises again
    "batch_size": 4, "iters": 30, "steps_per_eval": 2, "steps_per_report": 2, "save_every": 4,
    "val_batches": -1, "learning_rate": 3e-2, "preset": "simpo", "max_margin": 1e9,
    "max_logp_drop": 1e9, "early_stopping": 2,
}  # fmt: skip


def open_overshoot(llama, out, **changes):
    return open_trainer(llama, out, PAIRS[:4], valid=PAIRS[4:], **{**OVERSHOOT, **changes})


def test_validations_that_find_nothing_better_end_the_run_and_the_best_is_kept(llama, tmp_path):
    trainer = open_overshoot(llama, tmp_path)
    kept, reports = {}, []
    for report in trainer.run():
        reports.append(report)
        if isinstance(report, ValidReport):
            kept[report.iteration] = weights(trainer)
    valid = [r for r in reports if isinstance(r, ValidReport)]
    *_, saved, stopped = reports
    lowest = min(valid, key=lambda r: r.loss)
    assert stopped == StoppedReport(valid[-1].iteration, 2, lowest.iteration, lowest.loss)
    assert saved == SavedReport(valid[-1].iteration, numbered=True)
    assert valid[-1].iteration == lowest.iteration + 4 < 30
    assert [r.best for r in valid[-3:]] == [True, False, False]
    best = mx.load(str(tmp_path / "best" / "adapters.safetensors"))
    for name, array in kept[lowest.iteration].items():
        np.testing.assert_array_equal(np.array(best[name]), array)


def test_without_the_setting_the_run_goes_on(llama, tmp_path):
    reports = list(open_overshoot(llama, tmp_path, early_stopping=None, iters=14).run())
    assert reports[-1] == SavedReport(14, numbered=True)
    assert not any(isinstance(r, StoppedReport) for r in reports)


@pytest.mark.parametrize("updates", [1, 3, 5])
def test_an_interrupted_run_stops_early_where_the_straight_one_does(llama, tmp_path, updates):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    (*_, want) = open_overshoot(llama, straight).run()
    assert want.iteration > updates
    asked = iter(range(1, 1000))
    trainer = open_overshoot(llama, parted, stop=lambda: 130 if next(asked) >= updates else None)
    with pytest.raises(Interrupted):
        list(trainer.run())
    again = open_overshoot(llama, parted, start=False)
    again.resume()
    (*_, got) = again.run()
    assert got == want
    for name in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (straight / name).read_bytes() == (parted / name).read_bytes()
    assert log_of(straight) == log_of(parted)


def test_a_run_that_had_stopped_early_stays_stopped_and_goes_on_with_more_patience(llama, tmp_path):
    (*_, stopped) = open_overshoot(llama, tmp_path).run()
    before = (tmp_path / "adapters.safetensors").read_bytes()
    again = open_overshoot(llama, tmp_path, start=False)
    again.resume()
    assert list(again.run()) == [stopped]
    assert (tmp_path / "adapters.safetensors").read_bytes() == before
    patient = open_overshoot(llama, tmp_path, start=False, early_stopping=3)
    patient.resume()
    (*_, later) = patient.run()
    assert later.iteration > stopped.iteration


# Updates left out ---------------------------------------------------------------------------------


def poison(trainer, when):
    """Make the gradient of some updates (counted from 1) not finite."""
    original, count = trainer._gradient, iter(range(1, 1000))

    def gradient(indices):
        values, total = original(indices)
        if next(count) in when:
            values = {**values, "loss": values["loss"] * np.nan}
        return values, total

    trainer._gradient = gradient


def test_a_skipped_update_moves_nothing_and_is_counted(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, iters=4, on_divergence="skip")
    poison(trainer, {2, 4})
    state, reports = {}, []
    for report in trainer.run():
        reports.append(report)
        state[report.iteration] = weights(trainer)
    skipped = [r for r in reports if isinstance(r, SkippedReport)]
    assert [(r.iteration, r.in_a_row) for r in skipped] == [(2, 1), (4, 1)]
    assert "not finite" in skipped[0].reason
    steps = {r.iteration: r for r in reports if isinstance(r, StepReport)}
    assert list(steps) == [1, 3]  # a report of nothing but skipped updates has no figures
    assert (steps[1].skipped, steps[3].skipped) == (0, 1)
    assert steps[3].pairs == 4
    assert np.isfinite(steps[3].loss)
    for name, array in state[1].items():
        np.testing.assert_array_equal(state[2][name], array)
    assert any((state[3][name] != array).any() for name, array in state[1].items())
    assert [x["kind"] for x in log_of(tmp_path)] == ["train", "skipped", "train", "skipped"]


def test_a_report_beside_a_skipped_update_has_the_gradient_norm_of_the_one_that_was_made(
    llama, tmp_path
):
    """Also across an interruption between the two, and as JSON that every reader takes."""
    settings = {"iters": 4, "on_divergence": "skip", "steps_per_report": 2, "preset": "dpo"}
    asked = iter(range(1, 1000))
    trainer = open_trainer(
        llama, tmp_path, PAIRS, **settings, stop=lambda: 130 if next(asked) == 3 else None
    )
    norms, original = [], trainer._gradient
    trainer._gradient = lambda at: kept(original(at), norms)
    with pytest.raises(Interrupted):
        list(trainer.run())
    again = open_trainer(llama, tmp_path, PAIRS, **settings, start=False)
    again.resume()
    original_again = again._gradient
    again._gradient = lambda at: infinite(original_again(at))
    (report,) = [r for r in again.run() if isinstance(r, StepReport)]
    assert report.iteration == 4
    assert report.grad_norm == pytest.approx(norms[2], rel=1e-5)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def kept(found, norms):
    squares = sum(float((g * g).sum()) for _, g in tree_flatten(found[1]))
    norms.append(squares**0.5)
    return found


def infinite(found):
    values, gradient = found
    return values, tree_map(lambda g: g * float("inf"), gradient)


def test_so_many_skipped_in_a_row_end_the_run(llama, tmp_path):
    trainer = open_trainer(
        llama, tmp_path, PAIRS, iters=9, on_divergence="skip", max_skipped_updates=3
    )
    poison(trainer, {2, 4, 5, 6})
    with pytest.raises(Diverged, match=r"iteration 6: .*\(3 updates in a row") as error:
        list(trainer.run())
    assert error.value.exit_code == 4
    assert "Lower --learning-rate" in str(error.value)
    assert (tmp_path / "adapters.safetensors").is_file()


def test_an_update_that_would_be_infinite_is_undone_with_its_optimizer_state(
    llama, tmp_path, monkeypatch
):
    trainer = open_trainer(
        llama, tmp_path, PAIRS, iters=3, on_divergence="skip", batch_size=8, optimizer="adam"
    )
    original = trainer._update

    def update(gradient, norm, parameters):
        new = original(gradient, norm, parameters)
        if trainer.progress.iteration == 1:
            new = tree_map(lambda array: array * float("inf"), new)
        return new

    monkeypatch.setattr(trainer, "_update", update)
    reports = list(trainer.run())
    assert [r.iteration for r in reports if isinstance(r, SkippedReport)] == [2]
    assert int(trainer.optimizer.state["step"]) == 2
    assert all(np.isfinite(array).all() for array in weights(trainer).values())


def test_a_resumed_run_remembers_what_it_left_out(llama, tmp_path):
    """Two skipped before the interruption and one after it are three in a row."""
    settings = {"iters": 9, "on_divergence": "skip", "max_skipped_updates": 3}
    asked = iter(range(1, 1000))
    trainer = open_trainer(
        llama, tmp_path, PAIRS, stop=lambda: 130 if next(asked) >= 3 else None, **settings
    )
    poison(trainer, {2, 3})
    with pytest.raises(Interrupted):
        list(trainer.run())
    again = open_trainer(llama, tmp_path, PAIRS, start=False, **settings)
    again.resume()
    poison(again, {1})
    with pytest.raises(Diverged, match="iteration 4: .*3 updates in a row"):
        list(again.run())


def test_a_resumed_run_that_diverges_at_once_leaves_what_an_unbroken_one_leaves(llama, tmp_path):
    """The adapters from before the last update, which the guard had let pass."""
    settings = {"iters": 9, "learning_rate": 1e-2}
    straight = open_trainer(llama, tmp_path / "a", PAIRS, **settings)
    poison(straight, {4})
    with pytest.raises(Diverged, match="iteration 4"):
        list(straight.run())
    asked = iter(range(1, 1000))
    first = open_trainer(
        llama, tmp_path / "b", PAIRS, stop=lambda: 130 if next(asked) >= 3 else None, **settings
    )
    with pytest.raises(Interrupted):
        list(first.run())
    again = open_trainer(llama, tmp_path / "b", PAIRS, start=False, **settings)
    again.resume()
    poison(again, {1})
    with pytest.raises(Diverged, match="iteration 4"):
        list(again.run())
    left = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert left[0] == left[1]


def test_d_past_the_users_bound_stops_the_run(llama, tmp_path):
    trainer = open_trainer(
        llama, tmp_path, PAIRS, iters=60, learning_rate=3e-2, max_feature_distance=1e-6,
        objective={"alpha": 0.0},
    )  # fmt: skip
    with pytest.raises(Diverged, match="over --max-feature-distance 1e-06"):
        list(trainer.run())


def test_simpo_against_another_models_reference_is_refused_at_step_zero(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, iters=1, preset="simpo")
    rng = np.random.default_rng(0)
    noise = {
        name: mx.array(rng.normal(size=array.shape).astype(np.float32) * 0.2)
        for name, array in adapters.parameters(trainer.model)
    }
    adapters.update(trainer.model, noise)
    with pytest.raises(ModelError, match="the policy is not the reference"):
        list(trainer.run())
