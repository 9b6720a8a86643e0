"""What a run says that it will look at is what its updates ask for, up to the last one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.config import TrainConfig
from fpo_mlx.data import batches, visited
from fpo_mlx.records import TokenPair

pytest.importorskip("mlx.core")

from fpo_mlx.machine.parallel import Ranks  # noqa: E402
from fpo_mlx.train.order import Order  # noqa: E402

SEED = st.integers(0, 2**40)


def pairs_of(sizes: list[int], turned: set[int]) -> list[TokenPair]:
    """A pair of each size; those in `turned` are followed by one that turns them round."""
    pairs = []
    for n, size in enumerate(sizes):
        one, other = np.arange(size) + 100 * n, np.arange(size + 1) + 100 * n + 50
        pairs.append(TokenPair(np.full(3, 1), one, other, len(pairs)))
        if n in turned:
            pairs.append(TokenPair(np.full(3, 2), other, one, len(pairs)))
    return pairs


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40), st.sets(st.integers(0, 39), max_size=5),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SEED,
    st.one_of(
        st.fixed_dictionaries({"iters": st.integers(1, 60)}),
        st.fixed_dictionaries({"epochs": st.floats(0.01, 3)}),
    ),
)  # fmt: skip
def test_what_is_visited_is_what_the_updates_of_all_processes_ask_for(
    sizes, turned, batch_size, accumulation, ranks, seed, length
):
    """batch_size: of each process."""
    pairs = pairs_of(sizes, turned)
    config = TrainConfig(
        batch_size=batch_size * ranks, grad_accumulation_steps=accumulation, seed=seed, **length
    )
    order = Order(pairs, config)
    updates = list(itertools.islice(order.updates(0), order.total // accumulation))
    asked = {
        int(position)
        for indices in updates
        for rank in range(ranks)
        for position in indices[Ranks(rank, ranks).part(len(indices)).positions]
    }
    assert order.visited().tolist() == sorted(asked)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 9), SEED,
       st.integers(0, 200))  # fmt: skip
def test_the_visited_indices_are_those_of_the_first_batches(lengths, size, seed, count):
    some = itertools.islice(batches(np.array(lengths), size, seed), count)
    wanted = sorted({int(i) for indices in some for i in indices})
    assert visited(np.array(lengths), size, seed, count).tolist() == wanted


@pytest.mark.parametrize(
    ("epochs", "iterations"), [(1.1, 110), (0.07, 7), (0.071, 8), (3.0, 300), (1e-9, 1)]
)
def test_passes_that_make_whole_updates_are_not_rounded_up_to_one_more(epochs, iterations):
    """1.1 * 100 is a little more than 110 in floats."""
    assert TrainConfig(epochs=epochs, batch_size=4).iterations(400) == iterations


@pytest.mark.parametrize(("val_batches", "seen"), [(-1, 7), (0, 0), (2, 6), (9, 7)])
def test_a_validation_looks_at_the_first_pairs(val_batches, seen):
    assert TrainConfig(val_batches=val_batches, batch_size=3).validated(7) == seen
