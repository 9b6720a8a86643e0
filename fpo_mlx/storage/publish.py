"""Folders to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpo_mlx.errors import FpoError


def upload(folder: Path, repo: str, what: str, only: Sequence[str] | None = None) -> None:
    """A folder's files to a hub repository, made if absent. Nothing is written into the folder.

    what: is in the folder ("The SAE"), for the message; only: names, the others stay here.
    Raises: FpoError for whatever the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), allow_patterns=None if only is None else [*only],
            commit_message=f"{what} of fpo-mlx",
        )  # fmt: skip
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise FpoError(
            f"{repo}: the upload failed ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). {what} is in {folder}; check HF_TOKEN and "
            "the name (owner/name), then upload that folder."
        ) from error
