"""The reference cache: what training needs of the reference model, on disk.

The folder, format version 1, is readable with numpy and safetensors alone:

    manifest.json              format, version, identity, digest
    rows-00000.safetensors     a shard: some rows; numbered from 0 on
    rows-00001.safetensors     …

One row per (prompt tokens, response tokens). Its key is the first 16 bytes of
sha256(number of prompt tokens as little-endian int64, prompt ids, response ids), each id as
little-endian int32. So a cache survives reordered and partial data, and serves every objective.

Arrays of a shard of n rows, s = 0, 1, … the number of an SAE in the identity's `saes`:

    keys                 uint8   [n, 16]
    logps                float64 [n]      nats, summed over the response
    tokens               int32   [n]      length of the response
    features.s.offsets   int64   [n + 1]  row i owns [offsets[i], offsets[i + 1]) of the next two
    features.s.indices   int32   [nnz]    ascending within a row
    features.s.values    float32 [nnz]    mean SAE activation over the response positions
    features.s.dropped   float32 [n, 2]   only with pooled_keep: largest magnitude and sum of
                                          squares of what was not stored

A shard's metadata has one entry, `fpo_mlx`: the JSON text of format, version, identity (digest),
backend, dtype, rows, and the sha256 of everything behind the header. All values are finite.

The identity says what the values belong to: `model`, `adapter` ("none"), `tokenizer` (content
fingerprints), `saes` (pairs of SAE fingerprint and site), `pooled_keep` (null: every non-zero),
`projected` (only with --project-out), and for the record `dtype` and `backend`. A run whose
adapter, tokenizer or projected differ is refused (of the rest: docs/files.md); dtype and backend
may differ, each shard tells its own. `digest` is the sha256 over the JSON text of [format, version,
identity without dtype and backend], keys sorted, without spaces. The manifest lists no shards: a
file counts when it is there, and it is there whole or not at all (written as .tmp-*, synced,
renamed). `writer.lock` is held while a process writes; `parts/` holds a cache for each of several
processes until they are joined.
"""

from fpo_mlx.cache.fill import SHARD_PAIRS, FillReport, fill, plan
from fpo_mlx.cache.housekeeping import Entry, list_caches, remove, select
from fpo_mlx.cache.identity import CacheIdentity, Provenance
from fpo_mlx.cache.shards import keep_largest
from fpo_mlx.cache.shared import fill_shared
from fpo_mlx.cache.store import ReferenceCache, open_cache, read_identity
from fpo_mlx.cache.tools import (
    CacheInfo,
    MergeReport,
    VerifyReport,
    compare_scores,
    export,
    info,
    merge,
    verify_rows,
)

__all__ = [
    "SHARD_PAIRS",
    "CacheIdentity",
    "CacheInfo",
    "Entry",
    "FillReport",
    "MergeReport",
    "Provenance",
    "ReferenceCache",
    "VerifyReport",
    "compare_scores",
    "export",
    "fill",
    "fill_shared",
    "info",
    "keep_largest",
    "list_caches",
    "merge",
    "open_cache",
    "plan",
    "read_identity",
    "remove",
    "select",
    "verify_rows",
]
