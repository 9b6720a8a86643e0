"""What a user does with a finished cache: look at it, verify it, merge parts, export it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import safetensors

from fpo_mlx.cache.fill import ScorePairs, rows_of
from fpo_mlx.cache.identity import CacheIdentity, Provenance, check_same
from fpo_mlx.cache.shards import Shard, check_content
from fpo_mlx.cache.store import ReferenceCache, open_cache, read_identity
from fpo_mlx.errors import CacheMismatch, DataError
from fpo_mlx.records import ResponseScore, TokenPair
from fpo_mlx.storage import files


@dataclass(frozen=True)
class CacheInfo:
    """A summary; `dropped_*` tell what `pooled_keep` cost (zeros when everything is kept)."""

    folder: Path
    identity: CacheIdentity
    made: Provenance  # what its first rows were made by
    rows: int
    shards: int
    bytes: int
    tokens: int  # response tokens of all stored rows
    mean_logp: float  # nats a response token
    backends: tuple[tuple[str, str, int], ...]  # (backend, dtype, rows)
    mean_nonzeros: tuple[float, ...]  # stored features a row, of each SAE
    dropped_largest: tuple[float, ...]  # largest magnitude of a feature that was not stored
    dropped_share: tuple[float, ...]  # of the sum of squares of all rows, what was not stored


@dataclass(frozen=True)
class VerifyReport:
    """Largest differences between stored and freshly computed rows."""

    rows: int
    logp_relative: float  # |a - b| / max(1, |a|)
    feature_relative: float  # max |a - b| of a row / max |a| of that row (or of b, where a is 0)
    worst: str  # which row the larger of the two is in


@dataclass(frozen=True)
class MergeReport:
    """Outcome of a merge: rows written, rows that were there already, and how these differed."""

    rows: int
    duplicates: int
    largest_logp_difference: float  # nats, between duplicates; the row that came first stays


def open_whole(folder: str | Path) -> ReferenceCache:
    """The cache in a folder as what it says it is."""
    return open_cache(folder, read_identity(folder))


def info(folder: str | Path) -> CacheInfo:
    """Read every shard of a cache and sum up. Raises FpoError when one is damaged."""
    cache = open_whole(folder)
    made: dict[tuple[str, str], int] = {}
    for shard in cache.shards:
        check_content(shard)
        by = (shard.backend, shard.dtype)
        made[by] = made.get(by, 0) + len(shard.keys)
    stored = sum(len(shard.keys) for shard in cache.shards)
    tokens = sum(int(shard.tokens.sum()) for shard in cache.shards)
    saes = [_sae_figures(cache.shards, s, stored) for s in range(len(cache.identity.saes))]
    return CacheInfo(
        folder=Path(folder),
        identity=cache.identity,
        made=cache.made,
        rows=len(cache),
        shards=len(cache.shards),
        bytes=sum(shard.path.stat().st_size for shard in cache.shards),
        tokens=tokens,
        mean_logp=sum(float(s.logps.sum()) for s in cache.shards) / max(tokens, 1),
        backends=tuple((*by, rows) for by, rows in sorted(made.items())),
        mean_nonzeros=tuple(nonzeros for nonzeros, _, _ in saes),
        dropped_largest=tuple(largest for _, largest, _ in saes),
        dropped_share=tuple(share for _, _, share in saes),
    )


def _sae_figures(shards: Sequence[Shard], number: int, rows: int) -> tuple[float, float, float]:
    """(mean non-zeros a row, largest dropped magnitude, dropped share of the squares)."""
    nonzeros, largest, dropped, kept = 0, 0.0, 0.0, 0.0
    for shard in shards:
        nonzeros += int(shard.offsets[number][-1])
        with safetensors.safe_open(shard.path, framework="np") as file:
            kept += float((file.get_tensor(f"features.{number}.values").astype(float) ** 2).sum())
            if f"features.{number}.dropped" in file.keys():  # noqa: SIM118 (no mapping)
                lost = file.get_tensor(f"features.{number}.dropped")
                largest = max(largest, float(lost[:, 0].max(initial=0.0)))
                dropped += float(lost[:, 1].sum())
    return nonzeros / max(rows, 1), largest, dropped / max(dropped + kept, 1e-30)


def verify_rows(
    cache: ReferenceCache,
    pairs: Sequence[TokenPair],
    score: ScorePairs,
    *,
    sample: int = 16,
    seed: int = 0,
) -> VerifyReport:
    """Score a random sample of the pairs anew and compare it with their rows.

    Raises DataError when none of the pairs is in the cache.
    """
    there = [pair for pair in pairs if not cache.missing(pair.keys)]
    if not there:
        raise DataError(
            f"None of the {len(pairs)} pairs is in {cache.folder}, so nothing can be verified. "
            "Name the data and tokenizer that the cache was made from."
        )
    picked = np.random.default_rng(seed).permutation(len(there))[:sample]
    group = [there[i] for i in sorted(picked)]
    logp, features, worst = 0.0, 0.0, ("", -1.0)
    rows = rows_of(group, score(group), len(cache.wanted.saes))
    for number, (key, fresh) in enumerate(rows):
        a, b = compare_scores(cache.get(key), fresh)
        logp, features = max(logp, a), max(features, b)
        if max(a, b) > worst[1]:
            pair = group[number // 2]
            worst = (f"{pair.where or f'pair {pair.index}'}, row {key.hex()}", max(a, b))
    return VerifyReport(len(rows), logp, features, worst[0])


def compare_scores(stored: ResponseScore, fresh: ResponseScore) -> tuple[float, float]:
    """(relative log-prob difference, pooled-feature difference relative to the row's maximum)."""
    logp = abs(stored.logps - fresh.logps) / max(1.0, abs(stored.logps))
    worst = 0.0
    for a, b in zip(stored.features, fresh.features, strict=True):
        size = 1 + max((int(f.indices[-1]) for f in (a, b) if len(f.indices)), default=0)
        x, y = a.to_dense(size), b.to_dense(size)
        scale = float(np.abs(x).max()) or float(np.abs(y).max()) or 1.0
        worst = max(worst, float(np.abs(x - y).max()) / scale)
    return logp, worst


def merge(parts: Sequence[str | Path], out: str | Path) -> MergeReport:
    """Join caches of one identity into `out`, which may exist; a row that is there stays.

    The shards are taken in turn from each part (first of each, second of each, …), so parts that
    were dealt out round-robin give the files of an undivided run. The parts are left as they are.
    Raises CacheMismatch when the parts are not of one identity.
    """
    caches = [open_whole(part) for part in parts]
    if not caches:
        return MergeReport(0, 0, 0.0)
    first = caches[0].identity
    for cache in caches[1:]:
        check_same(cache.folder, cache.identity, first)
        if cache.identity != first:
            raise CacheMismatch(
                f"{cache.folder} and {caches[0].folder} do not hold the same SAEs in the same "
                "order with the same feature limit, so their rows cannot stand in one cache. "
                "Merge parts of one `fpo-mlx precompute` setting."
            )
    target = open_cache(out, first, create=True, made=caches[0].made)
    report = MergeReport(0, 0, 0.0)
    with target.writing():
        for turn in zip_longest(*([(c, s) for s in c.shards] for c in caches)):
            for cache, shard in filter(None, turn):
                report = _merge_shard(target, cache, shard, report)
    return report


def _merge_shard(
    target: ReferenceCache, part: ReferenceCache, shard: Shard, report: MergeReport
) -> MergeReport:
    double = [key for key in shard.keys if key in target]
    gap = max((abs(target.get(key).logps - part.get(key).logps) for key in double), default=0.0)
    return MergeReport(
        rows=report.rows + target.adopt(shard, part.identity),
        duplicates=report.duplicates + len(double),
        largest_logp_difference=max(report.largest_logp_difference, gap),
    )


def export(folder: str | Path, path: str | Path) -> int:
    """Write the rows as JSON lines, in the order of the cache; the number of rows.

    {"key", "logp", "tokens", "features": [{"indices", "values"}, … one for each SAE]}
    """
    cache, path = open_whole(folder), Path(path)
    with files.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for key in cache.keys():  # noqa: SIM118 (a list in file order, not a mapping)
            score = cache.get(key)
            features = [
                {"indices": f.indices.tolist(), "values": f.values.tolist()} for f in score.features
            ]
            row = {"key": key.hex(), "logp": score.logps, "tokens": score.tokens}
            file.write(json.dumps(row | {"features": features}) + "\n")
    return len(cache)
