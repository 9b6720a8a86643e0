"""What a run draws at random, when, and by which seed; and what its clock counts."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from cached import IDENTITY  # noqa: E402
from helpers import SIZES, open_trainer, random_pairs  # noqa: E402

from fpo_mlx.config import load_config  # noqa: E402
from fpo_mlx.data import batches, pair_lengths  # noqa: E402
from fpo_mlx.machine.parallel import Ranks  # noqa: E402
from fpo_mlx.model import adapters, randomness  # noqa: E402
from fpo_mlx.pipeline.job import Job  # noqa: E402
from fpo_mlx.pipeline.policy import open_policy  # noqa: E402
from fpo_mlx.train import trainer as trainer_module  # noqa: E402
from fpo_mlx.train.events import LandedReport, StepReport, ValidReport  # noqa: E402
from fpo_mlx.train.metrics import Window  # noqa: E402

PAIRS, VALID = random_pairs(SIZES), random_pairs([*SIZES, *SIZES], seed=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def test_dropout_is_on_within_a_gradient_and_off_everywhere_else(llama, tmp_path):
    training = {"gradient": [], "between": []}
    trainer = open_trainer(
        llama, tmp_path, PAIRS, preset="dpo", dropout=0.5, iters=2, valid=PAIRS[:2],
        steps_per_eval=1, stop=lambda: training["between"].append(trainer.model.training),
    )  # fmt: skip
    gradient, looked = trainer._gradient, trainer._looked
    trainer._gradient = lambda at: (
        training["gradient"].append(trainer.model.training) or gradient(at)
    )
    trainer._looked = lambda: training["between"].append(trainer.model.training) or looked()
    list(trainer.run())
    assert training == {"gradient": [True] * 2, "between": [False] * 5}


@pytest.mark.parametrize(("dropout", "told"), [(0.0, True), (0.5, False)])
def test_what_adapters_drop_is_not_told_as_rounding_whatever_the_settings_say(
    llama, tmp_path, monkeypatch, dropout, told
):
    """An adapter that a run begins from keeps its own dropout."""
    monkeypatch.setattr("fpo_mlx.train.guard.NOISE", -1.0)  # float32 has too little
    given = {} if dropout else {"dropout": 0.5}
    trainer = open_trainer(
        llama, tmp_path, PAIRS, preset="dpo", dropout=dropout, iters=1, lora_parameters=given
    )
    trainer.scorer.half = True
    (first,) = (x for x in trainer.run() if isinstance(x, StepReport))
    assert any("rounding of" in note for note in first.warnings) is told


def test_the_seed_orders_the_pairs(llama, tmp_path):
    orders = {}
    for seed in (3, 4):
        trainer = open_trainer(llama, tmp_path / str(seed), PAIRS, preset="dpo", iters=4, seed=seed)
        seen, original = orders.setdefault(seed, []), trainer._gradient
        trainer._gradient = lambda at, seen=seen, run=original: seen.append(at.tolist()) or run(at)
        list(trainer.run())
        lengths = pair_lengths(PAIRS)
        assert seen == [at.tolist() for at in islice(batches(lengths, 2, seed), 4)]
    assert orders[3] != orders[4]


def test_the_seed_draws_the_adapters_that_a_policy_begins_with(llama):
    drawn = []
    for seed in (3, 4, 3):
        config = load_config({"model": str(llama), "objective": "dpo", "seed": seed})
        scorer, _ = open_policy(Job(config, llama, None, (), IDENTITY), say=lambda _: None)
        named = adapters.parameters(scorer.policy.model)
        drawn.append(np.concatenate([np.array(a).ravel() for name, a in named if "lora_a" in name]))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert not np.isclose(drawn[0], drawn[1]).any()


def test_each_process_drops_on_its_own_and_the_same_again_after_a_resume(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, preset="dpo")
    places = []
    for _ in range(2):
        for rank in range(2):
            for iteration in (0, 1):
                trainer.ranks, trainer.progress.iteration = Ranks(rank, 2), iteration
                trainer._seed_dropout()
                places.append(randomness.position())
    assert places[:4] == places[4:]
    assert len(set(places)) == 4


def test_of_several_processes_dropout_is_seeded_before_every_gradient(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, preset="dpo", iters=2)
    steps, original = [], trainer._gradient
    trainer._seed_dropout = lambda: steps.append("seed")
    trainer._gradient = lambda at: steps.append("gradient") or original(at)
    list(trainer.run())
    assert steps == ["seed", "gradient"] * 2


def test_validating_and_landing_are_no_time_of_training(llama, tmp_path, monkeypatch):
    clock = [0.0]

    def spent(seconds, call):
        def timed(*args):
            clock[0] += seconds
            return call(*args)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer_module, "Window", lambda: Window(started=clock[0]))
    trainer = open_trainer(
        llama, tmp_path, PAIRS, valid=VALID, objective={"target_drift": 0.02}, iters=2,
        steps_per_report=2, steps_per_eval=1,
    )  # fmt: skip
    trainer._gradient, trainer._looked = (
        spent(1, trainer._gradient), spent(100, trainer._looked)
    )  # fmt: skip
    reports = list(trainer.run())
    assert len([r for r in reports if isinstance(r, ValidReport)]) == 3
    (step,) = [r for r in reports if isinstance(r, StepReport)]
    assert step.pairs_per_second == 4 / 2
    (landed,) = [r for r in reports if isinstance(r, LandedReport)]
    assert landed.seconds >= 100
    assert trainer.progress.window["seconds"] == 0  # a run that goes on begins with it
