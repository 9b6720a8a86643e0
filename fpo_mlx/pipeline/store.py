"""The reference's scores of pairs: the cache that holds them, opened and filled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from fpo_mlx import cache
from fpo_mlx.cache import CacheIdentity, FillReport, Provenance, ReferenceCache
from fpo_mlx.errors import CacheMismatch, ConfigError, pip_install
from fpo_mlx.machine import upstream
from fpo_mlx.machine.processes import find_share
from fpo_mlx.pipeline.job import Job, Say
from fpo_mlx.pipeline.sae_fit import quick_check
from fpo_mlx.records import PairScore, TokenPair
from fpo_mlx.reference import ReferenceBackend, open_backend
from fpo_mlx.storage import paths

OnFill = Callable[[FillReport], None]
Agree = Callable[[Path, bool], bool]
WAIT_SAID = 60.0  # seconds of waiting for other processes until a user hears of it


def default_cache(identity: CacheIdentity) -> Path:
    return paths.cache_root() / "reference" / identity.digest()[:16]


def reference_of(
    job: Job,
    pairs: Sequence[TokenPair],
    say: Say,
    progress: OnFill = lambda _: None,
    *,
    other_weights: bool = False,
    agree: Agree = lambda _, lacking: lacking,
) -> ReferenceCache:
    """The cache that --reference names, or the default one, with a row for each of these responses.

    other_weights: take a cache of another model that has them all too (its `differences` say so).
    agree: from whether this process finds rows lacking to whether to score, alike on all (yes
    where any process lacks some); asked once, whatever this process finds.
    """
    reference = job.config.train.reference
    folder = Path(reference) if reference else default_cache(job.identity)
    if reference:
        job = replace(job, identity=as_kept(folder, job, say))
    try:
        store = find_whole(folder, job.identity, pairs, other_weights=other_weights)
    except CacheMismatch as error:
        if not reference or other_weights:
            raise
        raise CacheMismatch(
            f"{error} Or leave `reference` out, or give --reference a new folder: this model is "
            "then scored itself."
        ) from error
    if agree(folder, store is None):
        return score_into(folder, job, pairs, say=say, progress=progress)
    assert store is not None  # or `agree` would have been told of rows lacking
    return store


def find_whole(
    folder: Path, identity: CacheIdentity, pairs: Sequence[TokenPair], *, other_weights: bool
) -> ReferenceCache | None:
    """The cache, if it has all rows. A killed writer's half files are cleared from it.

    other_weights: also one of another model and nothing else, which is read-only then.
    Raises: CacheMismatch when it was made for something else, or cannot grow here and lacks rows.
    """
    keys = [key for pair in pairs for key in pair.keys]
    if other_weights and (folder / "manifest.json").exists():
        found = cache.read_identity(folder)
        if found.model != identity.model:
            store = cache.open_cache(folder, identity, allow=("model",))
            _refuse_lacking(store, keys)
            store.mark_used()
            return store
    store = cache.open_cache(folder, identity, create=True)
    store.mark_used()
    if store.missing(keys):
        return None
    store.tidy()
    return store


def _refuse_lacking(store: ReferenceCache, keys: Sequence[bytes]) -> None:
    """Raises: CacheMismatch where a cache of another model, which cannot grow here, lacks rows."""
    lacking = store.missing(keys)
    if lacking:
        raise CacheMismatch(
            f"{store.folder} is of another model ({store.identity.model[:12]}) and lacks "
            f"{len(lacking)} of {len(set(keys))} responses, which this one cannot add. Run "
            "`fpo-mlx precompute` with that model on this data (train, valid and test), or train "
            "with another --reference."
        )


def as_kept(folder: Path, job: Job, say: Say) -> CacheIdentity:
    """The job's identity, with the feature limit of the cache that is there already, if any.

    Raises: ConfigError when the cache keeps fewer features than --top-k looks at.
    """
    if not (folder / "manifest.json").exists() or not job.identity.saes:
        return job.identity
    keep, top_k = cache.read_identity(folder).pooled_keep, job.config.objective.top_k
    if keep is None:
        return job.identity
    check_keep(keep, top_k, f"{folder} keeps the {keep} largest features of a response")
    say(
        f"{folder} keeps the {keep} largest features of a response, so D is not exact: what it "
        "left out reads as 0 (`fpo-mlx cache info` says how much that is)"
    )
    return replace(job.identity, pooled_keep=keep)


def check_keep(keep: int, top_k: int, found: str) -> None:
    if keep < top_k:
        raise ConfigError(
            f"{found}, but --top-k {top_k} looks at more. Keep at least {top_k}, or all."
        )


def fill_cache(
    job: Job,
    pairs: Sequence[TokenPair],
    *,
    folder: Path,
    say: Say,
    progress: OnFill = lambda _: None,
) -> ReferenceCache:
    """Open or make the cache and score the rows that it lacks; the model is loaded only then."""
    store = find_whole(folder, job.identity, pairs, other_weights=False)
    if store is not None:
        return store
    return score_into(folder, job, pairs, say=say, progress=progress)


def score_into(
    folder: Path,
    job: Job,
    pairs: Sequence[TokenPair],
    *,
    say: Say,
    progress: OnFill = lambda _: None,
) -> ReferenceCache:
    """Load the reference and score what the cache lacks.

    Under a launcher (torchrun, mlx.launch, …) every process scores its share into the one folder.
    """
    share = find_share(os.environ)
    store = cache.open_cache(folder, job.identity, create=True)
    lacking = sum(bool(store.missing(pair.keys)) for pair in pairs)
    store.check_extendable()  # before the model is loaded
    say(f"scoring {lacking} of {len(pairs)} pairs with the reference into {folder}")
    engine = open_engine(job, say=say)
    if share.rank == 0:
        check_saes(job, engine, pairs, say)
    cache.fill_shared(
        folder, job.identity, pairs, engine.score, rank=share.rank, world=share.world,
        made=Provenance(engine.dtype, job.backend), report=progress, pause=_patience(folder, say),
    )  # fmt: skip
    return cache.open_cache(folder, job.identity)


def check_saes(job: Job, engine: ReferenceBackend, pairs: Sequence[TokenPair], say: Say) -> None:
    """Say how well the SAEs read a few answers, and warn where one does not."""
    if job.config.reference.check_sae and job.config.objective.constraint != "activations":
        specs = job.config.reference.sae[: len(job.saes)]
        for line in quick_check(job.config, dict(zip(specs, job.saes, strict=True)), engine, pairs):
            say(line)


def _patience(folder: Path, say: Say) -> Callable[[float], None]:
    """A pause that says, once, what the wait is for when it grows long."""
    waited = [0.0]

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        waited[0] += seconds
        if waited[0] == WAIT_SAID:
            say(
                f"waiting for the other processes, whose parts belong into {folder / 'parts'}; "
                "machines without that folder in common have to precompute apart and "
                "`fpo-mlx cache merge`"
            )

    return pause


def open_engine(job: Job, *, say: Say) -> ReferenceBackend:
    """The frozen reference, loaded; what the user should know of it is said."""
    if job.backend == "torch":
        _say_untried(say)
    engine = open_backend(
        job.backend,
        model_path=job.model_path,
        adapter_path=job.adapter,
        saes=job.saes,
        device=job.device,
        dtype=job.config.reference.dtype,
        tokens_per_batch=job.config.reference.tokens_per_batch,
        share_prompt=job.config.reference.share_prompt,
        trust_remote_code=job.config.reference.trust_remote_code,
        projections=job.projections,
    )
    for note in engine.notes:
        say(note)
    for flag in ("dtype", "tokens_per_batch") if job.backend == "mlx" else ():
        if (value := getattr(job.config.reference, flag)) is not None:
            name = flag.replace("_", "-")
            say(f"--{name} {value} is for --backend torch; mlx computes in the model's own type")
    return engine


def _say_untried(say: Say) -> None:
    """A machine for this backend alone has its packages by --no-deps: pip looked at no range."""
    for one in upstream.outside():
        if one.package in ("torch", "transformers"):
            say(
                f"warning: {one.package} {one.installed} is outside the versions that were tried "
                f"({one.range}), and may give other scores without a word: "
                f"{pip_install(f'{one.package}{one.range}')}"
            )


class CachedScores(Sequence[PairScore]):
    """The reference's scores of pairs, read from the cache at each access: none stays in memory."""

    def __init__(
        self,
        store: ReferenceCache,
        pairs: Sequence[TokenPair],
        needed: Iterable[int] | None = None,
    ) -> None:
        """needed: positions of the pairs that are read; default all.

        Raises: CacheMismatch when a row of theirs is missing.
        """
        self._store, self._pairs = store, pairs
        read = pairs if needed is None else (pairs[i] for i in needed)
        if missing := store.missing(key for pair in read for key in pair.keys):
            store.get(missing[0])

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, at: int) -> PairScore: ...
    @overload
    def __getitem__(self, at: slice) -> CachedScores: ...
    def __getitem__(self, at: int | slice) -> PairScore | CachedScores:
        """Raises: FpoError when the row's shard is damaged."""
        if isinstance(at, slice):
            return CachedScores(self._store, self._pairs[at])
        chosen, rejected = self._pairs[at].keys
        return self._store.get(chosen), self._store.get(rejected)
