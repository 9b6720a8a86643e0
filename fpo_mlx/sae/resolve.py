"""The value of --sae to a path on this disk, downloading only the files of that one SAE.

Through huggingface_hub, so HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN hold as everywhere.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fpo_mlx.errors import SaeError
from fpo_mlx.sae import registry
from fpo_mlx.sae.arrays import refuse_pickle
from fpo_mlx.sae.files import companions, listed_weights
from fpo_mlx.storage.files import listed
from fpo_mlx.storage.hub import shown_size

_SPARE = 1.05  # part of the download's size that must be free


@dataclass(frozen=True)
class HubSae:
    """An SAE in a hub repository: `inside` is its folder or file, "" for the root."""

    repo: str
    inside: str
    revision: str | None = None  # branch, tag or commit


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; size in bytes, 0 if the hub does not say."""

    name: str
    size: int


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    report: Callable[[str], None] | None = None,
) -> Path:
    """The local path of an SAE: an existing path, `owner/repo[@revision][/path]`, or a release's.

    Releases are SAELens' (`gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55`). revision: a
    branch, tag or commit of the repository, if `spec` names none. allow_pickle: False refuses a
    pickled file before it is fetched. report: told what will be fetched, and its size.
    Raises SaeError if nothing is there, the hub cannot be reached, or the disk is too small.
    """
    local = Path(spec).expanduser()
    if local.exists():
        return local
    where = parse(spec)
    revision = where.revision or revision
    say = report or (lambda _: None)
    try:
        files = _listing(where.repo, revision)
    except Exception as error:  # offline, gated, unknown, no network: the cache may still have it
        return _cached(where, revision, error, say)
    names = [file.name for file in files]
    weights = listed_weights(names, where.inside, where.repo)
    refuse_pickle(f"{where.repo}/{weights}", allow_pickle)
    wanted = [weights, *companions(names, weights)]
    missing = [
        file for file in files if file.name in wanted and not _has(where.repo, file, revision)
    ]
    if missing:
        say(_announcement(where.repo, missing))
        _check_disk(sum(file.size for file in missing), where.repo)
    return _fetch(where.repo, wanted, revision)


def parse(spec: str) -> HubSae:
    """`owner/repo[@revision][/path]` or `release[@revision]/sae_id`, taken apart. No network."""
    parts = spec.removeprefix("hf://").split("/")
    at = 0 if registry.named(parts[0].partition("@")[0]) is not None else 1
    revision = None
    if len(parts) > at and "@" in parts[at]:
        parts[at], _, revision = parts[at].partition("@")
        if not re.fullmatch(r"[\w.-]+", revision):
            raise SaeError(f"{spec}: {revision!r} is no revision; wanted a branch, tag or commit.")
    release = registry.named(parts[0])
    if any(part in ("", ".", "..", "~") or "\\" in part for part in parts):
        raise SaeError(f"{spec}: no such file or folder.")
    if release is not None:
        inside = release.path_of("/".join(parts[1:])) if len(parts) > 1 else None
        if inside is None:
            known = ", ".join(rule.sae_id for rule in release.rules[:8])
            raise SaeError(
                f"{spec}: {parts[0]} is a release of many SAEs; name one of them, e.g. "
                f"{release.example}{f' (known: {known}, …)' if known else ''}."
            )
        return HubSae(release.repo, inside, revision)
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts[:2]):
        raise SaeError(
            f"{spec}: no such file or folder, and no known release. Give a path, owner/repo/path, "
            "or a name from `fpo-mlx sae list`."
        )
    return HubSae("/".join(parts[:2]), "/".join(parts[2:]), revision)


def _listing(repo: str, revision: str | None) -> list[HubFile]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [HubFile(file.rfilename, file.size or 0) for file in info.siblings or ()]
    for file in files:
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts or "\\" in file.name:
            raise SaeError(f"{repo}: lists a file outside of its own folder: {file.name!r}.")
    return files


def _has(repo: str, file: HubFile, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file.name, revision=revision), str)


def _fetch(repo: str, names: Sequence[str], revision: str | None) -> Path:
    """Download all; the path of the first. The companions land beside it."""
    from huggingface_hub import hf_hub_download

    try:
        paths = [Path(hf_hub_download(repo, name, revision=revision)) for name in names]
    except Exception as error:  # the hub client raises its own, its transport's and the system's
        raise SaeError(f"{repo}: the download failed: {_first_line(error)}. Try again.") from error
    for name, path in zip(names, paths, strict=True):
        if path.parts[-len(PurePosixPath(name).parts) :] != PurePosixPath(name).parts:
            raise SaeError(f"{repo}: {name!r} was stored outside of its folder, at {path}.")
    return paths[0]


def _cached(
    where: HubSae, revision: str | None, error: Exception, say: Callable[[str], None]
) -> Path:
    """The copy in the hub's cache, for a machine without network. Raises SaeError."""
    if isinstance(error, SaeError):
        raise error
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(where.repo, revision=revision, local_files_only=True))
    except Exception as absent:  # not in the cache either: the first error is the one to show
        raise SaeError(
            f"{where.repo} cannot be reached ({_first_line(error)}) and is not in the cache. "
            "Check the name, the network, HF_HUB_OFFLINE, and `hf auth login` for gated "
            "repositories."
        ) from absent
    names = [file.relative_to(root).as_posix() for file in listed(root, "**/*") if file.is_file()]
    found = root / listed_weights(names, where.inside, f"the cached copy of {where.repo}")
    say(f"{where.repo} cannot be reached; using the cached copy.")
    return found


def _announcement(repo: str, missing: Sequence[HubFile]) -> str:
    names = ", ".join(file.name for file in missing)
    total = sum(file.size for file in missing)
    return f"fetching {repo}: {len(missing)} file(s), {shown_size(total)} ({names})"


def _check_disk(size: int, repo: str) -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size * _SPARE:
        raise SaeError(
            f"{repo}: the download needs {shown_size(size)}, but {folder} has {shown_size(free)} "
            "free. Make room, or set HF_HOME to a larger disk."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
