"""A drift target below what the steps cause: they become shorter, which is said and resumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, log_of, open_trainer, random_pairs, weights  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from fpo_mlx.errors import Interrupted  # noqa: E402
from fpo_mlx.train.events import StepReport  # noqa: E402

PAIRS = random_pairs(SIZES)
TOO_FAST = {
    "batch_size": 4, "iters": 12, "steps_per_report": 1, "optimizer": "adam", "learning_rate": 6e-2,
    "objective": {"target_drift": 0.5}, "max_margin": 1e9, "max_logp_drop": 1e9,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def straight(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return list(open_trainer(llama, folder, PAIRS, **TOO_FAST).run()), folder


def test_the_user_is_told_once_and_sees_the_part_that_is_left(straight):
    reports = [r for r in straight[0] if isinstance(r, StepReport)]
    told = [[w for w in r.warnings if "--target-drift 0.5 is less than" in w] for r in reports]
    assert sum(map(len, told)) == 1
    parts = [r.part for r in reports]
    assert parts[-1] < 0.7
    assert parts == sorted(parts, reverse=True), "7 % shorter while the drift is above its target"
    assert reports[-1].learning_rate == pytest.approx(TOO_FAST["learning_rate"])


def test_validation_losses_are_of_one_objective_whatever_alpha_is(llama, tmp_path):
    """Else what is best, and what early stopping ends, would be alpha's doing."""
    settings = {**TOO_FAST, "max_margin": 50.0}
    trainer = open_trainer(llama, tmp_path, PAIRS, valid=PAIRS, **settings)
    trainer.folder.start({}, None)
    list(trainer.run())
    found = []
    for level in (1e-3, 1.0, 1e3):
        trainer._steer(replace(trainer.drift, level=level))
        found.append(trainer._validate())
        assert trainer.scorer.alpha == trainer.drift.alpha
    assert len({one.loss for one in found}) == 1
    trainer._steer(None)
    for trainer.scorer.alpha in (0.0, 1.0):
        assert trainer._validate().loss == found[0].loss
    assert trainer._measure(trainer.train)["loss"].mean() != found[0].loss, "alpha counts here"


def test_an_update_goes_that_part_of_the_optimizers_way(llama, tmp_path, monkeypatch):
    trainer, ways = open_trainer(llama, tmp_path, PAIRS, **TOO_FAST), []
    whole = trainer._update

    def update(gradient, norm, parameters):
        before, part = weights(trainer), trainer.drift.part
        after = whole(gradient, norm, parameters)
        ways.append((part, before, {n: np.array(a) for n, a in tree_flatten(after)}))
        return after

    monkeypatch.setattr(trainer, "_update", update)
    list(trainer.run())
    for (part, before, aim), (_, after, _) in zip(ways, ways[1:], strict=False):
        for name in before:
            by_hand = before[name] + np.float32(part) * (aim[name] - before[name])
            np.testing.assert_allclose(after[name], by_hand, rtol=1e-6, atol=1e-9)
    assert ways[0][0] == 1.0
    assert ways[-1][0] < 0.9


def test_stopped_while_steps_are_short_and_resumed_it_equals_the_run_that_was_not(
    llama, straight, tmp_path
):
    asked = iter(range(1, 100))
    trainer = open_trainer(
        llama, tmp_path, PAIRS, stop=lambda: 130 if next(asked) >= 5 else None, **TOO_FAST
    )
    with pytest.raises(Interrupted):
        list(trainer.run())
    again = open_trainer(llama, tmp_path, PAIRS, start=False, **TOO_FAST)
    again.resume()
    assert again.drift.part < 1.0
    list(again.run())
    one, other = (folder / "adapters.safetensors" for folder in (tmp_path, straight[1]))
    assert one.read_bytes() == other.read_bytes()
    assert log_of(tmp_path) == log_of(straight[1])
