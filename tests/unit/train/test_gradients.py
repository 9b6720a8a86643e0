"""Gradients from forward passes alone: what they estimate, and what they leave as it was."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import SIZES, open_trainer, random_adapters, random_pairs, weights  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from fpo_mlx.config import PRESETS, TrainConfig  # noqa: E402
from fpo_mlx.core.objectives import PairLosses  # noqa: E402
from fpo_mlx.machine.parallel import Ranks  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.train.events import StepReport  # noqa: E402
from fpo_mlx.train.gradients import (  # noqa: E402
    GRADIENTS,
    Ground,
    backward,
    directions,
    forward,
)
from fpo_mlx.train.scoring import Measures  # noqa: E402

PAIRS = random_pairs(SIZES)
FORWARD = {"gradient": "forward", "optimizer": "sgd", "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def ground_of(llama, out, **settings):
    """A policy that has left its reference, so that no part of the loss is at rest."""
    trainer = open_trainer(llama, out, PAIRS[:4], micro_batch_size=3, **FORWARD, **settings)
    values = {k: mx.array(v) for k, v in random_adapters(trainer.model, 0.05).items()}
    adapters.update(trainer.model, values)
    return Ground(trainer.scorer, trainer.train, trainer.config, trainer.ranks)


def flat(tree):
    return {name: np.array(array) for name, array in tree_flatten(tree)}


@pytest.mark.parametrize(
    ("preset", "changes", "fine_tune_type"),
    [
        *((preset, {}, "lora") for preset in PRESETS if preset not in ("dpo", "fpo", "tdpo2")),
        ("dpo", {}, "lora"),
        ("dpo", {}, "dora"),
        ("fpo", {"alpha": 0.05}, "lora"),  # its SAE is a top-k one, whose features come and go
        ("fpo", {"alpha": 0.05, "stop_gradient": False}, "lora"),
        ("tdpo1", {}, "dora"),
        ("tdpo2", {}, "lora"),  # the chosen KL is held: the slope of the value is another
        ("tdpo2", {}, "dora"),
        ("orpo", {"wpo": True}, "lora"),  # so are WPO's weights
    ],
)
def test_the_slope_along_the_direction_is_the_gradients(
    llama, tmp_path, preset, changes, fine_tune_type
):
    """c is the directional derivative, so <estimate, move> = <gradient, move> |move|^2 / r."""
    ground = ground_of(
        llama, tmp_path, preset=preset, fine_tune_type=fine_tune_type, forward_epsilon=5e-4,
        objective=changes,
    )  # fmt: skip
    model, indices = ground.scorer.policy.model, np.arange(4)
    here = dict(adapters.parameters(model))
    moves = {k: np.array(v) for k, v in directions(here, ground.config, 5).items()}
    values, estimate = forward(ground, indices, 5)
    want_values, gradient = backward(ground, indices, 5)
    found, gradient = flat(estimate), flat(gradient)
    assert set(found) == set(gradient)
    slope = sum((gradient[k] * moves[k]).sum() for k in moves)
    for name, array in found.items():
        want = slope * moves[name] / ground.config.forward_rank
        np.testing.assert_allclose(array, want, rtol=0.03, atol=0.03 * np.abs(want).max())
    assert abs(slope) > 1e-2
    for name in ("loss", "logps/chosen"):  # the mean of the two passes, but for terms in e^2
        np.testing.assert_allclose(values[name], want_values[name], rtol=2e-2, err_msg=name)


def test_the_mean_over_directions_is_the_gradient():
    """E <G, UV^T> UV^T / r = G, within four standard errors; DoRA's vectors too."""
    rng, rank, draws = np.random.default_rng(0), 2, 3000
    gradient = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    here = {k: mx.array(v.astype(np.float32)) for k, v in gradient.items()}
    found = {k: [] for k in gradient}
    for update in range(draws):
        config = TrainConfig(forward_rank=rank, forward_interval=1)
        moves = {k: np.array(v) for k, v in directions(here, config, update).items()}
        slope = sum((gradient[k] * moves[k]).sum() for k in moves)
        for name, move in moves.items():
            found[name].append(slope * move / rank)
    for name, want in gradient.items():
        each = np.stack(found[name])
        error = each.std(axis=0) / draws**0.5
        assert (np.abs(each.mean(axis=0) - want) < 4 * error).all(), name
        assert error.max() < 0.25


def test_a_direction_is_made_anew_from_the_seed_and_the_update(llama, tmp_path):
    """Equal numbers give equal directions; one half of them lasts for an interval."""
    here, config = {"a": mx.zeros((6, 2))}, TrainConfig(forward_interval=3, forward_rank=1, seed=4)

    def at(update, seed=4):
        own = TrainConfig(forward_interval=3, forward_rank=1, seed=seed)
        return np.array(directions(here, own, update)["a"])

    np.testing.assert_array_equal(at(7), np.array(directions(here, config, 7)["a"]))
    assert np.abs(at(7) - at(7, seed=5)).max() > 0.1
    # rank 1: rows of UV^T are multiples of V, so equal up to a factor within the interval
    shape = [at(update)[0] / np.abs(at(update)[0]).max() for update in (6, 8, 9)]
    np.testing.assert_allclose(np.abs(shape[0]), np.abs(shape[1]), rtol=1e-5)
    assert np.abs(np.abs(shape[0]) - np.abs(shape[2])).max() > 1e-2
    assert np.abs(at(6) - at(8)).max() > 0.1


def test_it_leaves_adapters_random_state_and_mode_as_they_were(llama, tmp_path):
    ground = ground_of(llama, tmp_path, dropout=0.5)
    model = ground.scorer.policy.model
    model.train()
    before, state = weights_of(model), mx.random.state[0].tolist()
    first, again = (forward(ground, np.arange(4), 0) for _ in range(2))
    assert model.training
    assert mx.random.state[0].tolist() == state
    for name, array in weights_of(model).items():
        np.testing.assert_array_equal(array, before[name])
    for name, array in flat(first[1]).items():  # nothing was dropped
        np.testing.assert_array_equal(array, flat(again[1])[name])


def weights_of(model):
    return {k: np.array(v) for k, v in adapters.parameters(model)}


@pytest.mark.parametrize("preset", ["fpo", "orpo", "sft"])  # a constraint, a term, one response
def test_pairs_are_learned_without_a_backward_pass(llama, tmp_path, preset):
    """Chosen tokens are below 150, rejected ones above, as where the gradient is exact."""
    rng, pairs = np.random.default_rng(0), random_pairs([(4, 4, 4)] * 4)
    for pair in pairs:
        pair.chosen[:], pair.rejected[:] = rng.integers(3, 150, 4), rng.integers(150, 300, 4)
    settings = {**FORWARD, "max_grad_norm": 1.0, "learning_rate": 0.1}
    trainer = open_trainer(
        llama, tmp_path, pairs, preset=preset, batch_size=4, iters=30, steps_per_report=30,
        objective={"beta": 1.0, "alpha": 0.01}, max_logp_drop=1e9, **settings,
    )  # fmt: skip
    before = trainer._measure(trainer.train)["loss"].mean()
    (report,) = [r for r in trainer.run() if isinstance(r, StepReport)]
    assert trainer._measure(trainer.train)["loss"].mean() < before - 0.01 * abs(before)
    assert report.grad_norm > 0
    assert any(np.abs(v).max() > 0 for k, v in weights(trainer).items() if k.endswith("lora_b"))


SIZE = 1 << 22  # of one matrix: far more than all else


def test_a_gradient_is_gone_when_the_next_pass_begins():
    """Beside the sum of those before it."""
    gc.collect()
    model = nn.Module()
    model.lora_a = mx.zeros((SIZE,))
    mx.eval(model.parameters())
    began, without = [], mx.get_active_memory()

    def losses(pairs, refs, grad):
        began.append(round((mx.get_active_memory() - without) / model.lora_a.nbytes))
        one, sides = (model.lora_a * model.lora_a).sum().reshape(1), mx.ones((2, 1))
        return PairLosses(one, one, one, one), Measures(sides, sides, sides, *[mx.ones((1,))] * 3)

    policy = SimpleNamespace(model=model, dtype=mx.float32)
    scorer = SimpleNamespace(policy=policy, losses=losses, half=False, objective=None)
    data = SimpleNamespace(take=lambda some: SimpleNamespace(pairs=[None], refs=[None]))
    ground = Ground(scorer, data, SimpleNamespace(micro_batch_size=1), Ranks())
    _, gradient = backward(ground, np.arange(4), 0)
    mx.eval(gradient)
    assert began == [0, 1, 1, 1]


class Tree(dict):
    """A dict that weak references can be had of."""


def test_a_trainer_keeps_no_gradient_of_the_update_before(llama, tmp_path, monkeypatch):
    kept, last = [], [lambda: None]

    def watched(*words):
        kept.append(last[0]() is not None)
        values, gradient = backward(*words)
        gradient = Tree(gradient)
        last[0] = weakref.ref(gradient)
        return values, gradient

    monkeypatch.setitem(GRADIENTS, "backward", watched)
    list(open_trainer(llama, tmp_path, PAIRS[:4], batch_size=1, iters=4).run())
    assert kept == [False] * 4
