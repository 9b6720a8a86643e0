"""Steps of SAE training: what they are given, what they count, and in what order."""

from __future__ import annotations

import numpy as np
import pytest
from test_saetrain import documents, factors, small, start

mx = pytest.importorskip("mlx.core")

from fpo_mlx.core import dictionary  # noqa: E402
from fpo_mlx.saetrain import rows, trainer  # noqa: E402
from fpo_mlx.saetrain.rows import Position  # noqa: E402
from fpo_mlx.saetrain.trainer import Plan  # noqa: E402

PLAN = Plan(24, 64, 64, 3e-3, 7, dead_after=256)


@pytest.fixture(scope="module")
def data():
    return factors(640)[1]


def test_every_pass_over_one_chunk_has_its_own_order():
    stream = rows.batches(rows.from_array(np.arange(512)[:, None]), 64, 0, Position())
    passes = [np.stack([next(stream)[0][:, 0] for _ in range(8)]) for _ in range(2)]
    for one in passes:
        assert sorted(one.ravel()) == list(range(512))
    assert set(passes[0][0]) != set(passes[1][0])


def test_every_pass_over_documents_cuts_them_into_other_chunks():
    items = documents(*range(3, 33))
    source = rows.from_documents(items, lambda part: [len(d.tokens) for d in part], rows=90, seed=0)
    passes, number = [], 0
    for _ in range(2):
        chunks = []
        while sum(map(len, chunks)) < len(items):
            chunks.append(frozenset(source.chunk(number)))
            number += 1
        passes.append(set(chunks))
    assert passes[0].isdisjoint(passes[1])


def test_features_unused_for_so_many_tokens_get_the_auxiliary_loss(data, monkeypatch):
    rule, asked = small(), []
    run, original = start(rule, data[:512]), dictionary.gradients
    monkeypatch.setattr(
        dictionary, "gradients", lambda *words: asked.append(words[-1]) or original(*words)
    )
    run.unused[:] = PLAN.dead_after
    trainer.step(run, rule, PLAN, data[:64])
    idle = np.flatnonzero(run.unused)
    assert asked == [None]
    assert 0 < len(idle) < len(run.unused)
    # those that fired count from 0 again, all others are dead now
    assert set(run.unused) == {0, PLAN.dead_after + 64}
    trainer.step(run, rule, PLAN, data[64:128])
    dead = np.array(asked[1])
    assert dead[dead >= 0].tolist() == idle.tolist()


def test_adam_counts_the_gradients_that_warmed_its_moments(data, monkeypatch):
    """Its moments are then of as many steps more, and would be divided by too little."""
    rule, counted = small(), []
    run, original = start(rule, data[:512]), dictionary.adam_step
    monkeypatch.setattr(
        dictionary, "adam_step", lambda *words: counted.append(words[4:]) or original(*words)
    )
    trainer.warm(run, rule, PLAN, data[:192])
    for at in range(2):
        trainer.step(run, rule, PLAN, data[64 * at :][:64])
    assert [step for _, step in counted] == [1, 2, 3, 4, 5]
    assert [rate > 0 for rate, _ in counted] == [False] * 3 + [True] * 2
