"""Filling one cache with several processes that share a folder and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fpo_mlx.cache.fill import SHARD_PAIRS, FillReport, ScorePairs, fill, plan, rows_of
from fpo_mlx.cache.identity import CacheIdentity, Provenance
from fpo_mlx.cache.shards import Row, Shard, ShardDamaged, ShardGone
from fpo_mlx.cache.store import LOCK, MANIFEST, PARTS, ReferenceCache, open_cache, shard_paths
from fpo_mlx.errors import FpoError
from fpo_mlx.records import ResponseScore, TokenPair
from fpo_mlx.storage import files, locks


@dataclass(frozen=True)
class _Group:
    """One shard to be: its pairs, and the keys that no earlier group brings."""

    pairs: list[TokenPair]
    keys: list[bytes]


def fill_shared(
    folder: str | Path,
    identity: CacheIdentity,
    pairs: Sequence[TokenPair],
    score: ScorePairs,
    *,
    rank: int,
    world: int,
    made: Provenance | None = None,
    shard_pairs: int = SHARD_PAIRS,
    report: Callable[[FillReport], None] = lambda _: None,
    pause: Callable[[float], None] = time.sleep,
) -> FillReport:
    """`fill` by `world` processes, each calling this with the same pairs and its own rank.

    The groups of the plan are dealt out in turn; each process writes a part cache of its own
    below `folder`, and rank 0 waits for all and puts the shards in the plan's order into the cache:
    the same bytes as one process writes. All return when the cache is whole. Parts that a killed
    run left are used, also when it had another number of processes.
    The launcher (torchrun, mlx.launch, …) has to end the others when one dies.
    Raises: what `fill` raises; FpoError for a rank outside of 0 … world - 1.
    """
    if not 0 <= rank < world:
        raise FpoError(f"rank {rank} of {world} processes: wanted a rank from 0 to {world - 1}.")
    folder = Path(folder)
    cache = open_cache(folder, identity, create=True, made=made)
    cache.check_extendable()
    if world == 1 and not (folder / PARTS).exists():
        return fill(cache, pairs, score, shard_pairs=shard_pairs, report=report)
    groups = _groups(cache, pairs, shard_pairs)
    part = folder / PARTS / f"{rank:03d}-of-{world:03d}"
    state = _fill_part(part, cache, groups[rank::world], score, report)
    if rank == 0:
        _collect(cache, groups, pause)
    while open_cache(folder, identity, create=True).missing(k for p in pairs for k in p.keys):
        pause(1.0)
    _remove(part)  # rank 0 has removed it, unless this process began when the rest was done
    return state


def _groups(cache: ReferenceCache, pairs: Sequence[TokenPair], shard_pairs: int) -> list[_Group]:
    seen: set[bytes] = set()
    groups = []
    for members in plan(cache, pairs, shard_pairs):
        keys = [key for key in cache.missing(k for p in members for k in p.keys) if key not in seen]
        seen.update(keys)
        groups.append(_Group(members, keys))
    return groups


def _fill_part(
    part: Path,
    whole: ReferenceCache,
    groups: Sequence[_Group],
    score: ScorePairs,
    report: Callable[[FillReport], None],
) -> FillReport:
    """Write each group as one shard of the part; a killed run's shard of that group is taken."""
    total = sum(len(group.pairs) for group in groups)
    state = FillReport(pairs=0, total_pairs=total, rows=0, shards=0, tokens=0)
    cache = open_cache(part, whole.wanted, create=True, made=whole.made)
    donors = [other for other in _parts(part.parents[1], cache) if other.folder != part]
    with cache.writing():
        for group in groups:
            rows = 0
            if _shard_of(cache, group) is None:
                rows = _take(cache, donors, group) or cache.append_whole(
                    _rows([cache, *donors], group, score)
                )
            state = FillReport(
                pairs=state.pairs + len(group.pairs),
                total_pairs=total,
                rows=state.rows + rows,
                shards=state.shards + 1,
                tokens=state.tokens + sum(pair.tokens for pair in group.pairs),
            )
            report(state)
    return state


def _rows(parts: Sequence[ReferenceCache], group: _Group, score: ScorePairs) -> list[Row]:
    """The rows of a group. What a killed run with other groups left of them is not scored again."""
    found = {key: row for part in parts for key in group.keys if (row := _left(part, key))}
    lacking = [pair for pair in group.pairs if not found.keys() >= set(pair.keys) & set(group.keys)]
    if lacking:
        found = dict(rows_of(lacking, score(lacking), len(parts[0].wanted.saes))) | found
    return [(key, found[key]) for key in group.keys]


def _left(part: ReferenceCache, key: bytes) -> ResponseScore | None:
    """A row as scoring would give it; None where it is not there, or was cut or made otherwise."""
    kind = (part.made.backend, part.made.dtype)
    if key not in part or part.wanted.pooled_keep or part.kind_of(key) != kind:
        return None
    with contextlib.suppress(ShardGone):  # joined and removed in the meantime
        return part.get(key)
    return None


def _take(cache: ReferenceCache, donors: Sequence[ReferenceCache], group: _Group) -> int:
    for donor in donors:
        shard = _shard_of(donor, group)
        if shard is not None:
            with contextlib.suppress(ShardGone):  # joined and removed in the meantime
                return cache.adopt(shard, donor.identity)
    return 0


def _shard_of(part: ReferenceCache, group: _Group) -> Shard | None:
    wanted = set(group.keys)
    likely = (shard for shard in part.shards if shard.keys[0] in wanted)
    return next((shard for shard in likely if set(shard.keys) == wanted), None)


def _collect(
    cache: ReferenceCache, groups: Sequence[_Group], pause: Callable[[float], None]
) -> None:
    """Adopt the shards of all groups in the plan's order, then remove the parts.

    Not before all are there: a process that begins late has to find the plan that the others found.
    """
    with cache.writing():
        parts = _parts(cache.folder, cache)
        while not all(any(_shard_of(part, group) for part in parts) for group in groups):
            pause(1.0)
            parts = _parts(cache.folder, cache)
        for group in groups:
            _take(cache, parts, group)
        for part in parts:  # what a killed run scored of other pairs is kept, where it is whole
            for shard in part.shards:
                with contextlib.suppress(ShardDamaged, ShardGone):
                    cache.adopt(shard, part.identity)
    for part in _parts(cache.folder, cache):
        _remove(part.folder)


def _parts(folder: Path, like: ReferenceCache) -> list[ReferenceCache]:
    """The part caches below a folder that may be joined with this one."""
    found = []
    for path in files.listed(folder / PARTS, "*-of-*"):
        try:
            part = open_cache(path, like.wanted, made=like.made)
        except FpoError:  # not begun yet, of another run, or just being removed
            continue
        if part.identity == like.identity:
            found.append(part)
    return found


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError, FpoError), locks.held(part / LOCK, part):
        files.sweep(part)
    for path in [*shard_paths(part), part / MANIFEST, part / LOCK]:
        path.unlink(missing_ok=True)
    for folder in (part, part.parent):
        try:
            folder.rmdir()
        except OSError:  # gone, or somebody else's part is in it
            return
