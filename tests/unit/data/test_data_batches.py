"""The order of training: every pair once an epoch, alike lengths together, startable anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.data import batches, batches_per_epoch, micro_batches, mirrored
from fpo_mlx.data.batches import epoch_batches
from fpo_mlx.records import TokenPair

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80).map(np.array)
SEED = st.integers(0, 2**40)


@given(LENGTHS, st.integers(1, 9), SEED, st.integers(0, 5))
def test_every_pair_comes_exactly_once_an_epoch(lengths, batch_size, seed, epoch):
    made = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate(made)) == list(range(len(lengths)))
    assert len(made) == batches_per_epoch(len(lengths), batch_size)
    full, last = divmod(len(lengths), batch_size)
    assert sorted(map(len, made), reverse=True) == [batch_size] * full + [last] * (last > 0)
    assert all((np.diff(lengths[batch]) >= 0).all() for batch in made)


@given(LENGTHS, st.integers(1, 9), SEED, st.integers(0, 60))
def test_a_run_that_starts_late_goes_on_as_if_it_had_never_stopped(lengths, size, seed, start):
    whole = list(itertools.islice(batches(lengths, size, seed), start + 10))
    late = list(itertools.islice(batches(lengths, size, seed, start=start), 10))
    assert [some.tolist() for some in late] == [some.tolist() for some in whole[start:]]
    each = batches_per_epoch(len(lengths), size)
    epochs = [epoch_batches(lengths, size, seed, n) for n in range(len(whole) // each + 1)]
    made = list(itertools.chain(*epochs))[: len(whole)]
    assert [some.tolist() for some in whole] == [some.tolist() for some in made]


def test_pairs_of_like_length_stand_together():
    lengths = np.random.default_rng(0).integers(1, 1000, size=64)
    spread = [np.ptp(lengths[batch]) for batch in epoch_batches(lengths, 4, seed=0, epoch=0)]
    assert np.mean(spread) < 100  # four pairs at random are 600 apart


def test_seed_and_epoch_change_the_order_and_equal_ones_do_not():
    lengths = np.arange(40) % 7

    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, 4, seed, epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # neither the order of lengths nor that of the file
    first = [lengths[batch].max() for batch in epoch_batches(lengths, 4, 0, 0)]
    assert first != sorted(first)


def test_the_order_is_the_same_on_every_machine():
    # pinned: a resumed run on another machine, or with another numpy, must see the same batches
    got = [batch.tolist() for batch in epoch_batches(np.array([5, 3, 9, 1, 7]), 2, seed=1, epoch=0)]
    assert got == [[0, 4], [3, 1], [2]]
    lengths = np.array([7 * i % 31 for i in range(70)])  # more than a pool
    order = np.concatenate(epoch_batches(lengths, 2, seed=3, epoch=1))
    assert order[:12].tolist() == [13, 22, 55, 26, 49, 27, 66, 4, 29, 60, 16, 56]
    assert order[-6:].tolist() == [42, 11, 69, 38, 67, 36]


def test_large_data_is_not_always_grouped_alike():
    lengths = np.arange(1000)
    groups = [{frozenset(b.tolist()) for b in epoch_batches(lengths, 2, 0, e)} for e in (0, 1)]
    assert len(groups[0] & groups[1]) < 50  # of 500: a full sort would repeat them all


@given(LENGTHS, st.integers(1, 9), st.integers(1, 9))
def test_micro_batches_are_the_batch_in_order(lengths, batch_size, size):
    for batch in epoch_batches(lengths, batch_size, 0, 0):
        pieces = micro_batches(batch, size)
        assert np.concatenate(pieces).tolist() == batch.tolist()
        assert all(0 < len(piece) <= size for piece in pieces)


def test_no_pairs_give_no_batches():
    assert epoch_batches(np.array([], dtype=int), 4, 0, 0) == []
    with pytest.raises(ValueError, match="no pairs"):
        next(batches(np.array([], dtype=int), 4, 0))


# Rows that turn each other round -----------------------------------------------------------------


def pair(prompt, chosen, rejected):
    return TokenPair(np.array(prompt), np.array(chosen), np.array(rejected), 0)


def test_a_row_and_the_next_one_that_turns_it_round_are_twins():
    plain, one, two = pair([1], [7], [8]), pair([1, 5], [2, 3], [4]), pair([1, 6], [4], [2, 3])
    assert mirrored([plain, plain, one]) is None
    assert mirrored([one, plain, two]) is None, "only neighbours"
    assert mirrored([plain, one, two, plain]).tolist() == [False, True, False, False]
    assert mirrored([pair([1], [7], [8]), pair([1], [8], [7])]) is None, "a contradiction"
    assert mirrored([one, two, one]).tolist() == [True, False, False], "each is in one pair of them"


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9), SEED, st.integers(0, 5))
def test_with_twins_every_pair_comes_once_and_twins_follow_each_other(two, size, seed, epoch):
    """two: for each that is dealt whether it has a twin; there is one that has."""
    twins = np.array([flag for has in (*two, True) for flag in ([True, False] if has else [False])])
    lengths = np.random.default_rng(seed).integers(1, 50, len(twins))
    made = epoch_batches(lengths, size, seed, epoch, twins)
    assert sorted(np.concatenate(made)) == list(range(len(twins)))
    assert len(made) == batches_per_epoch(len(twins), size)
    assert sum(len(batch) < size for batch in made) <= 1
    for batch in made:
        assert all(b == a + 1 for a, b in itertools.pairwise(batch) if twins[a])


@given(st.integers(1, 40), st.sampled_from([2, 4, 8]), SEED)
def test_where_all_have_a_twin_an_even_batch_never_parts_them(count, size, seed):
    twins = np.tile([True, False], count)
    lengths = np.random.default_rng(seed).integers(1, 50, 2 * count)
    for batch in epoch_batches(lengths, size, seed, 0, twins):
        assert all((at ^ 1) in batch for at in batch)
