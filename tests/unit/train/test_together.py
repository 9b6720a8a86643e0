"""Several pairs in one pass, as a GPU runs a micro batch: what one pair at a time gives."""

from __future__ import annotations

from dataclasses import replace

import gpu_path
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gpu_path import RECORD, Case, open_case
from helpers import random_pairs
from tiny_models import MAKERS

from fpo_mlx.judge.slots import row_axes
from fpo_mlx.machine import device
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy, _by_pair
from fpo_mlx.pipeline.device_check.launches import launches
from fpo_mlx.records import Site

# A prompt of one token leaves nothing to share; windows of 6 are crossed by both responses.
SIZES = [(9, 5, 8), (1, 7, 3), (6, 12, 9), (17, 2, 11)]
APART = replace(RECORD, together=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


def calls_of(policy: Policy) -> list[tuple[int, ...]]:
    """The shapes of the tokens of every forward pass from now on."""
    backbone, seen = policy.backbone, []

    def counted(tokens, cache=None):
        seen.append(tokens.shape)
        return backbone(tokens, cache=cache)

    policy.backbone = counted
    return seen


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "plain", "float32"),
        Case("llama", "plain", "float32", preset="tdpo2", checkpoint=True),
        Case("gemma2", "plain", "float32", checkpoint=True),
        Case("qwen3_moe", "plain", "float32"),
        Case("gpt_oss", "plain", "float32", kind="dora"),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_one_pair_at_a_time(root, case, monkeypatch):
    monkeypatch.setattr(gpu_path, "SIZES", SIZES)
    found = []
    for record, micro in ((APART, 1), (RECORD, 4)):
        with device.using(record):
            trainer = open_case(root, replace(case, micro=micro))
            gpu_path.stir(trainer)
            trainer.model.train()
            calls = calls_of(trainer.scorer.policy)
            values, gradient = trainer._gradient(np.arange(4))
            flat = np.concatenate([np.array(g).ravel() for _, g in gpu_path.arrays_of(gradient)])
            found.append((values, flat, len(calls)))
    (one, want, many), (four, got, few) = found
    policies = 2 if case.preset == "tdpo2" else 1  # the reference's rows, for the KL
    assert (many, few) == (8 * policies, 2 * policies)
    for name in ("loss", "logps/chosen", "logps/rejected", "u"):
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("maker", MAKERS)
def test_every_architecture_gives_the_same_rows(maker, tmp_path):
    """Those that cannot share a prompt, or run rows of their own offsets, go as before."""
    loaded = load_model(MAKERS[maker](tmp_path))
    policy = Policy(loaded.model, loaded.config, [Site(1)])
    pairs = random_pairs(SIZES, seed=4)
    with device.using(replace(APART, widen=True)):
        alone = [policy.rows([pair]) for pair in pairs]
    with device.using(replace(RECORD, widen=True)):
        calls = calls_of(policy)
        rows = policy.rows(pairs)
    for name in ("hidden", "tapped"):
        want, got = (
            np.concatenate([np.array(getattr(one, name)) for one in alone], axis=-2),
            np.array(getattr(rows, name)),
        )
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    if policy.shares_prompt and policy._row_axes:
        del calls[:-2]  # a look at the masks that the model wants
        assert [shape[0] for shape in calls] == [4, 4]
        assert all(shape[1] % RECORD.bucket == 0 for shape in calls)
    assert not policy.shares_prompt or policy._row_axes


def test_four_pairs_are_launched_as_one(root):
    """Counted in the graph of loss and gradient: 1.1 times one pair's, where apart it is four."""
    counts = []
    for record, pairs in ((RECORD, 1), (RECORD, 4), (APART, 4)):
        with device.using(replace(device.gpu("metal", 16e9), together=record.together)):
            trainer = open_case(root, Case("llama", "plain", "float32"))
            some = trainer.train.take(range(pairs))

            def loss(some=some, scorer=trainer.scorer):
                return scorer.losses(some.pairs, some.refs, grad=True)[0].losses.sum()

            value, gradient = nn.value_and_grad(trainer.model, loss)()
            counts.append(launches(value, *(g for _, g in gpu_path.arrays_of(gradient))))
    one, together, apart = counts
    assert together <= 1.1 * one
    assert apart >= 3.5 * one


def test_rows_go_back_to_the_order_of_the_pairs():
    """Chosen of 1 and 3 tokens, rejected of 2 and 1: c0 | c1 c1 c1 | r0 r0 | r1 as it was run."""
    pairs = random_pairs([(4, 1, 2), (5, 3, 1)])
    assert _by_pair(pairs).tolist() == [0, 4, 5, 1, 2, 3, 6]


def test_on_a_cpu_pairs_run_one_after_the_other(root):
    with device.using(device.cpu()):
        policy = open_case(root, Case("llama", "plain", "float32")).scorer.policy
        calls = calls_of(policy)
        mx.eval(policy.rows(random_pairs(SIZES)).hidden)
    assert [shape[0] for shape in calls] == [1] * 8


def test_heads_as_many_as_the_rows_of_a_trial_do_not_hide_what_masks_a_model_wants(root):
    """Three key heads beside three rows: masks of too few axes were laid along the heads."""
    folder = MAKERS["gemma2"](root / "three", hidden_size=48, num_attention_heads=6,
                              num_key_value_heads=3)  # fmt: skip
    loaded = load_model(folder)
    policy = Policy(loaded.model, loaded.config, [Site(1)])
    assert policy._row_axes == 5
    assert row_axes(loaded.model) == 5
    pairs = random_pairs(SIZES[:3])
    with device.using(APART):
        want = [np.array(policy.rows([pair]).hidden) for pair in pairs]
    with device.using(RECORD):
        got = np.array(policy.rows(pairs).hidden)
    np.testing.assert_allclose(got, np.concatenate(want), atol=1e-4 * np.abs(got).max())


def test_looking_for_the_masks_draws_no_number_of_the_dropout(root):
    """A resumed run looks anew, and would go on from another place of the generator."""
    with device.using(RECORD):
        trainer = open_case(root, Case("llama", "plain", "float32", micro=2), dropout=0.5)
        policy = trainer.scorer.policy
        policy.__dict__.pop("_row_axes", None)
        policy.model.train()
        before = mx.random.state[0].tolist()
        assert policy._row_axes == 4
        assert mx.random.state[0].tolist() == before
        assert policy.model.training
