"""Score what a cache lacks, in an order that makes a resumed run write the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fpo_mlx.cache.shards import Row, check_score
from fpo_mlx.cache.store import ReferenceCache
from fpo_mlx.errors import FpoError
from fpo_mlx.records import PairScore, TokenPair

ScorePairs = Callable[[Sequence[TokenPair]], list[PairScore]]
SHARD_PAIRS = 64  # what a killed run loses at most


@dataclass(frozen=True)
class FillReport:
    """Progress of a fill, and in the end its result. Counts are of this run."""

    pairs: int  # scored so far
    total_pairs: int  # to score in this run
    rows: int  # written so far
    shards: int  # written so far
    tokens: int  # of the pairs scored so far, the prompt once a pair


def plan(
    cache: ReferenceCache, pairs: Sequence[TokenPair], shard_pairs: int = SHARD_PAIRS
) -> list[list[TokenPair]]:
    """Groups of pairs with a missing row, one group a shard, short pairs first.

    The order depends on the token ids alone, and every group but the last is full: whatever was
    done before is a beginning of the same plan, so a resumed run goes on with the same groups.
    """
    seen: set[bytes] = set()
    chosen: list[TokenPair] = []
    for pair in sorted(pairs, key=lambda pair: (pair.tokens, pair.keys)):
        new = [key for key in pair.keys if key not in cache and key not in seen]
        if new:
            seen.update(new)
            chosen.append(pair)
    return [chosen[i : i + shard_pairs] for i in range(0, len(chosen), shard_pairs)]


def rows_of(pairs: Sequence[TokenPair], scores: Sequence[PairScore], n_saes: int) -> list[Row]:
    """The rows of scored pairs, chosen before rejected. Raises FpoError naming the pair's place."""
    if len(scores) != len(pairs):
        raise FpoError(f"The reference backend gave {len(scores)} scores for {len(pairs)} pairs.")
    rows: list[Row] = []
    for pair, pair_scores in zip(pairs, scores, strict=True):
        sides = zip(("chosen", "rejected"), pair.keys, pair.responses, pair_scores, strict=True)
        for side, key, response, score in sides:
            where = f"{pair.where or f'pair {pair.index}'}, {side}"
            check_score(where, score, n_saes)
            if score.tokens != len(response):
                raise FpoError(
                    f"{where}: scored {score.tokens} tokens of a response of {len(response)}."
                )
            rows.append((key, score))
    return rows


def fill(
    cache: ReferenceCache,
    pairs: Sequence[TokenPair],
    score: ScorePairs,
    *,
    shard_pairs: int = SHARD_PAIRS,
    report: Callable[[FillReport], None] = lambda _: None,
) -> FillReport:
    """Score every pair that has a row missing, one shard at a time, and say so after each.

    score is called with one group of the plan at a time. A kill at any point loses the group in
    work, nothing else. Raises CacheMismatch for a cache that can only be read, FpoError on values
    that are not finite (the shards before it stay).
    """
    with cache.writing():  # first, for another writer may just have finished a part of it
        groups = plan(cache, pairs, shard_pairs)
        if groups:
            cache.check_extendable()
        total = sum(map(len, groups))
        state = FillReport(pairs=0, total_pairs=total, rows=0, shards=0, tokens=0)
        for group in groups:
            rows = rows_of(group, score(group), len(cache.identity.saes))
            state = FillReport(
                pairs=state.pairs + len(group),
                total_pairs=total,
                rows=state.rows + cache.append(rows),
                shards=state.shards + 1,
                tokens=state.tokens + sum(pair.tokens for pair in group),
            )
            report(state)
    return state
