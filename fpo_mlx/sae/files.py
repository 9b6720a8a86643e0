"""Which files make up an SAE, on disk and in a repository's listing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fpo_mlx.errors import SaeError
from fpo_mlx.sae.arrays import PICKLED_SUFFIXES
from fpo_mlx.storage.files import listed

WEIGHTS = (".safetensors", ".npz", *PICKLED_SUFFIXES)
_NO_WEIGHTS = ("sparsity", "optimizer", "W_dec_", "activations_store_state", ".")
# where a folder holds several files, one of these is the SAE
_PREFERRED = (
    "sae_weights.safetensors",
    "params.npz",
    "params.safetensors",
    "sae.safetensors",
    "final.safetensors",
    "ae.pt",
)
CONFIGS = (
    "cfg.json",
    "config.json",
    "hyperparams.json",
    "config.yaml",
    "wandb-config.yaml",
    "wanb-config.yaml",
    "norm_scaling_factor.json",
)
_DEPTH = 6
_SHOWN = 12


def is_weights(name: str) -> bool:
    """True for the file name of weights that may be an SAE."""
    return name.endswith(WEIGHTS) and not name.startswith(_NO_WEIGHTS)


def weight_file(path: Path) -> Path:
    """The one weight file at or below `path`, the nearest level first. Raises SaeError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise SaeError(f"{path}: no such file or folder. Give the folder or file of one SAE.")
    level = [path]
    for _ in range(_DEPTH):
        entries = [entry for folder in level for entry in listed(folder)]
        found = [file for file in entries if is_weights(file.name) and file.is_file()]
        if found:
            return Path(_only([str(file) for file in found], str(path)))
        level = [entry for entry in entries if entry.is_dir()]
    raise SaeError(f"{path}: holds no SAE weights ({', '.join(WEIGHTS)}). Give an SAE's folder.")


def listed_weights(files: Sequence[str], inside: str, repo: str) -> str:
    """The same in a repository's listing: `inside` is a folder, a file, or a file without suffix.

    files: posix paths from the repository's root.
    """
    spellings = (inside, f"{inside}.safetensors", f"{inside}.pt", f"W_enc_{inside}.safetensors")
    for name in spellings:
        if name in files:
            return name
    prefix = f"{inside}/" if inside else ""
    below = [name for name in files if name.startswith(prefix) and is_weights(_name(name))]
    if not below:
        raise SaeError(
            f"{repo} has no SAE at {inside or 'its root'!r}. It has, among others:\n"
            f"{_some(_near(files, inside))}"
        )
    depth = min(name.count("/") for name in below)
    return _only([name for name in below if name.count("/") == depth], f"{repo}/{inside}")


def _near(files: Sequence[str], inside: str) -> Sequence[str]:
    """The files in the deepest folder on the way to `inside` that there is."""
    parts = inside.split("/")
    for depth in range(len(parts), 0, -1):
        folder = "/".join(parts[:depth]) + "/"
        if below := [name for name in files if name.startswith(folder)]:
            return below
    return files


def companions(files: Sequence[str], weights: str) -> list[str]:
    """The configuration files of `weights` that the listing has."""
    path = PurePosixPath(weights)
    folder = path.parent
    wanted = [folder / name for name in (*CONFIGS, f"{path.stem}_cfg.json")]
    wanted.append(folder.parent / "hyperparams.json")  # Llama Scope: above checkpoints/
    if path.name == "sae.safetensors":
        wanted.append(PurePosixPath("config.json"))  # sparsify: the model's name
    names = dict.fromkeys(str(name) for name in wanted)
    return [name for name in names if name in files and name != weights]


def _only(found: list[str], where: str) -> str:
    preferred = [name for name in found if _name(name) in _PREFERRED]
    if len(preferred or found) == 1:
        return (preferred or found)[0]
    raise SaeError(
        f"{where} holds {len(preferred or found)} SAEs; name one of them:\n"
        f"{_some(preferred or found)}"
    )


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _some(names: Sequence[str]) -> str:
    shown = [f"  {name}" for name in sorted(names) if is_weights(_name(name))][:_SHOWN]
    return "\n".join([*shown, *(["  …"] if len(names) > _SHOWN else [])])
