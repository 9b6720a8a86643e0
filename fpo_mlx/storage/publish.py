"""Folders to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from fpo_mlx.errors import FpoError


def upload(folder: Path, repo: str, what: str, only: Sequence[str] | None = None) -> None:
    """A folder's files to a hub repository, made if absent. Nothing is written into the folder.

    what: is in the folder ("The SAE"), for the message; only: names, the others stay here.
    Raises: FpoError for whatever the hub refuses, and for a repository with other weights beside
    which a whole folder's would be read.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        if only is None:
            _refuse_mixture(folder, repo, what, api.list_repo_files(repo))
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), allow_patterns=None if only is None else [*only],
            commit_message=f"{what} of fpo-mlx",
        )  # fmt: skip
    except FpoError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise FpoError(
            f"{repo}: the upload failed ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). {what} is in {folder}; check HF_TOKEN and "
            "the name (owner/name), then upload that folder."
        ) from error


def _refuse_mixture(folder: Path, repo: str, what: str, there: Iterable[str]) -> None:
    """Every loader reads all model*.safetensors: an earlier upload's shards would be among them."""
    shards = [name for name in there if fnmatch(name, "model*.safetensors*")]
    if left := sorted(name for name in shards if not (folder / name).exists()):
        raise FpoError(
            f"{repo} holds {left[0]} ({len(left)} such files), which this folder does not: whoever "
            f"loads it would mix the weights of two models. {what} is in {folder}, and nothing was "
            "uploaded. Remove those files there and upload the folder, or give another repository."
        )
