"""Several processes fill one cache: the same bytes as one, whoever dies when."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
from cached import IDENTITY, Scorer, filled, folder_bytes, make_pairs, shared_rows

from fpo_mlx import cache as rc
from fpo_mlx.cache import shared
from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.machine.processes import Share, find_share, is_first


class Dead(Exception):
    """Raised in the place of waiting: the others will never come."""


def no_wait(_: float) -> None:
    raise Dead


def run(folder: Path, pairs, rank: int, world: int, scorer=None, pause=no_wait):
    return rc.fill_shared(
        folder,
        IDENTITY,
        pairs,
        scorer or Scorer(),
        rank=rank,
        world=world,
        shard_pairs=2,
        pause=pause,
    )


def run_all(folder: Path, pairs, world: int) -> list[Scorer]:
    """Ranks one after the other, rank 0 last: it finds all parts done."""
    scorers = [Scorer() for _ in range(world)]
    for rank in reversed(range(1, world)):
        with pytest.raises(Dead):  # waits for rank 0 to join the parts
            run(folder, pairs, rank, world, scorers[rank])
    run(folder, pairs, 0, world, scorers[0])
    return scorers


@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("pairs", [make_pairs(11), shared_rows()], ids=["plain", "shared rows"])
def test_many_processes_write_the_bytes_of_one(tmp_path, pairs, world):
    filled(tmp_path / "one", pairs, shard_pairs=2)
    scorers = run_all(tmp_path / "many", pairs, world)
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")
    groups = [len(scorer.groups) for scorer in scorers]
    assert sum(groups) == len(list((tmp_path / "one").glob("rows-*")))
    assert max(groups) - min(groups) <= 1


def test_threads_that_run_at_once_and_wait_for_each_other(tmp_path):
    pairs = make_pairs(13)
    filled(tmp_path / "one", pairs, shard_pairs=2)
    gate = threading.Event()

    def work(rank):
        run(tmp_path / "many", pairs, rank, 3, pause=lambda _: gate.wait(0.01))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_a_manifest_that_another_process_writes_meanwhile_is_read(tmp_path, monkeypatch):
    filled(tmp_path / "one", make_pairs(2), shard_pairs=2)
    folder, listed = tmp_path / "many", Path.iterdir
    folder.mkdir()

    def late(path):
        if path == folder:
            shutil.copy(tmp_path / "one" / "manifest.json", folder)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", late)
    assert rc.open_cache(folder, IDENTITY, create=True).identity == IDENTITY


def in_process(folder: Path, rank: int) -> None:
    rc.fill_shared(folder, IDENTITY, make_pairs(9), Scorer(), rank=rank, world=2, shard_pairs=2)


def test_two_real_processes(tmp_path):
    filled(tmp_path / "one", make_pairs(9), shard_pairs=2)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=in_process, args=(tmp_path / "two", rank)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
    assert [process.exitcode for process in both] == [0, 0]
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize("kill", [0, 1, 2])
@pytest.mark.parametrize("world_after", [1, 2, 3])
def test_a_killed_run_goes_on_with_any_number_of_processes(tmp_path, kill, world_after):
    pairs = make_pairs(12)
    filled(tmp_path / "one", pairs, shard_pairs=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "many", pairs, 1, 2, Scorer(kill))
    scorers = run_all(tmp_path / "many", pairs, world_after)
    assert sum(len(scorer.groups) for scorer in scorers) == 6 - kill  # nothing is scored twice
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize(
    ("before", "after"), [(slice(1, 12), slice(0, 12)), (slice(12), slice(1, 14))]
)
def test_what_a_killed_run_left_of_other_pairs_is_used_where_the_groups_have_moved(
    tmp_path, before, after
):
    every = sorted(make_pairs(14), key=lambda pair: (pair.tokens, pair.keys))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, every[before], 1, 2, Scorer(2))
    left = {key for pair in (every[before][2:4] + every[before][6:8]) for key in pair.keys}
    scorers = run_all(tmp_path, every[after], 2)  # it waited for ever
    whole = rc.open_cache(tmp_path, IDENTITY)
    assert not whole.missing(key for pair in every[after] for key in pair.keys)
    again = [pair for scorer in scorers for group in scorer.groups for pair in group]
    assert not left & {key for pair in again for key in pair.keys}
    assert not (tmp_path / "parts").exists()


def test_parts_that_go_while_they_are_looked_at_are_scored_and_no_error(tmp_path):
    """Rank 0 of another number of processes may have joined them meanwhile."""
    pairs = make_pairs(8)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, pairs, 1, 2, Scorer(1))
    part = rc.open_cache(tmp_path / "parts" / "001-of-002", IDENTITY)
    shutil.rmtree(tmp_path / "parts")
    cache = rc.open_cache(tmp_path / "new", IDENTITY, create=True)
    group = shared._Group(pairs[:2], list(part.shards[0].keys))
    assert shared._take(cache, [part], group) == 0
    assert shared._left(part, group.keys[0]) is None


def test_what_other_pairs_left_in_parts_is_in_the_cache_of_the_next_run(tmp_path):
    """`evaluate` on the test pairs took hours of a killed precompute of the training pairs away."""
    train, test = make_pairs(12), make_pairs(4, seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train, 1, 2, Scorer(2))
    run(tmp_path, test, 0, 1)
    scorer = Scorer()
    run(tmp_path, train, 0, 1, scorer)
    assert len(scorer.groups) == 4
    assert not (tmp_path / "parts").exists()


def test_a_damaged_part_of_other_pairs_costs_its_own_rows_alone(tmp_path):
    train, test = make_pairs(12), make_pairs(4, seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train, 1, 2, Scorer(2))
    first, second = sorted((tmp_path / "parts" / "001-of-002").glob("rows-*"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    run(tmp_path, test, 0, 1)
    scorer = Scorer()
    run(tmp_path, train, 0, 1, scorer)
    assert second.parent.exists() is False
    assert len(scorer.groups) == 5


def test_parts_stay_where_a_full_disk_keeps_their_rows_from_being_taken(tmp_path, monkeypatch):
    train, test = make_pairs(12), make_pairs(2, seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train, 1, 2, Scorer(2))
    real = rc.ReferenceCache.adopt

    def full(self, part_shard, identity):
        if part_shard.path.parent.name == "001-of-002":
            raise FpoError("no room")
        return real(self, part_shard, identity)

    monkeypatch.setattr(rc.ReferenceCache, "adopt", full)
    with pytest.raises(FpoError, match="no room"):
        run(tmp_path, test, 0, 1)
    assert len(list((tmp_path / "parts" / "001-of-002").glob("rows-*"))) == 2


@pytest.mark.parametrize("made", [rc.Provenance("bfloat16", "mlx"), rc.Provenance("float32", "x")])
def test_rows_that_were_made_otherwise_are_scored_anew_in_a_group_of_others(tmp_path, made):
    pairs = make_pairs(4)
    part = rc.open_cache(tmp_path / "part", IDENTITY, create=True, made=made)
    rc.fill(part, pairs, Scorer())
    key = pairs[0].keys[0]
    assert shared._left(part, key) is not None
    assert shared._left(rc.open_cache(part.folder, IDENTITY, made=rc.Provenance()), key) is None


def test_half_a_file_in_a_part_of_another_number_of_processes_goes_with_it(tmp_path):
    pairs = make_pairs(12)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, pairs, 2, 3, Scorer(1))
    (tmp_path / "parts" / "002-of-003" / ".tmp-999999-rows-00001.safetensors").write_bytes(b"half")
    run(tmp_path, pairs, 0, 1)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("adopted", [0, 1, 3])
def test_a_kill_while_the_parts_are_joined_loses_nothing(tmp_path, monkeypatch, adopted):
    pairs = make_pairs(12)
    filled(tmp_path / "one", pairs, shard_pairs=2)
    with pytest.raises(Dead):
        run(tmp_path / "many", pairs, 1, 2)
    real, left = rc.ReferenceCache.adopt, [adopted]

    def dying(self, shard, identity):
        if self.folder == tmp_path / "many":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return real(self, shard, identity)

    with monkeypatch.context() as patch:
        patch.setattr(rc.ReferenceCache, "adopt", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "many", pairs, 0, 2)
    assert len(rc.open_cache(tmp_path / "many", IDENTITY)) == 4 * adopted
    scorers = run_all(tmp_path / "many", pairs, 2)
    assert all(not scorer.groups for scorer in scorers)
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_nothing_is_joined_before_all_parts_are_whole(tmp_path):
    """Else a process that begins late would find another plan, and deal the groups otherwise."""
    pairs = make_pairs(12)
    filled(tmp_path / "one", pairs, shard_pairs=2)
    for rank in (0, 1):
        with pytest.raises(Dead):
            run(tmp_path / "many", pairs, rank, 2)
        assert len(rc.open_cache(tmp_path / "many", IDENTITY)) == 0
    run(tmp_path / "many", pairs, 0, 2)
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_a_whole_cache_is_left_as_it_is(tmp_path):
    pairs = make_pairs(6)
    filled(tmp_path, pairs, shard_pairs=2)
    before = folder_bytes(tmp_path)
    for rank in (0, 1):
        assert run(tmp_path, pairs, rank, 2).rows == 0
    assert folder_bytes(tmp_path) == before


def test_a_rank_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(FpoError, match="rank 2 of 2"):
        run(tmp_path, [], 2, 2)


def test_the_share_is_what_the_launcher_says(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"], ["127.0.0.1:3"]]))
    assert find_share({}) == Share(0, 1)
    assert find_share({"RANK": "3", "WORLD_SIZE": "4"}) == Share(3, 4)
    assert find_share({"MLX_RANK": "2", "MLX_HOSTFILE": str(hosts)}) == Share(2, 3)
    assert find_share({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}) == Share(1, 2)
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}
    assert find_share(mpi) == Share(1, 8)
    assert find_share({"RANK": "5"}) == Share(0, 1)  # of something else
    hosts.write_text("\n")  # what mlx.launch -n 1 writes
    assert find_share({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) == Share(0, 1)


def test_only_the_first_process_speaks():
    assert [is_first({"RANK": str(rank), "WORLD_SIZE": "3"}) for rank in range(3)] == [1, 0, 0]
    assert is_first({})
    assert is_first({"MLX_RANK": "x"})  # the error is said where the share is needed


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"MLX_RANK": "1"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere/hosts.json"},
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(environment):
    with pytest.raises(ConfigError, match="Start with torchrun or mlx.launch"):
        find_share(environment)
