"""The reference cache: what training needs of the reference model, on disk.

Its folder, format version 1, is described in docs/files.md.
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
