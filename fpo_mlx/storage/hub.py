"""Model folders and the hub: names to local files. Needs neither mlx nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ModelError
from fpo_mlx.storage import files

TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # they go wherever the weights go
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.tiktoken", "README.md",
               *TERMS]  # fmt: skip
WEIGHTS = "model*.safetensors"  # what mlx-lm loads; no other copy, as original/ has one

# what GPT-2 and Lille, OpenELM, AFM 7, phixtral and EXAONE call otherwise than all others
OLD_NAMES = {
    "hidden_size": ("n_embd", "model_dim", "hidden_dim"),
    "num_hidden_layers": ("n_layer", "num_transformer_layers", "num_layers"),
    "num_attention_heads": ("n_head", "num_query_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "vocab_size": ("num_vocab",),
}
NO_CODE = ["*.py", "*.pyc", "*.so", "*.sh"]  # "tokenizer*" would let tokenizer_x.py in
CHECK = "Check the spelling, the network and HF_TOKEN, or give a local folder."


def resolve_model(spec: str | Path, *, weights: bool = True) -> Path:
    """A local folder as it is; else a hub id `owner/name[@revision]`, fetched without code files.

    weights: False where settings and tokenizer are all that is read.
    Raises: ModelError when neither can be had.
    """
    if (path := local_folder(spec)) is not None:
        return path
    repo, revision = hub_id(spec)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, ignore_patterns=NO_CODE,
                allow_patterns=[*SMALL_FILES, *([WEIGHTS] if weights else ())],
            )
        )  # fmt: skip
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes
        raise ModelError(
            f"{spec}: neither a local folder nor a model that could be downloaded ({reason(error)})"
            f". {remedy(repo, CHECK)}"
        ) from error


def local_folder(spec: str | Path) -> Path | None:
    """The folder that `spec` names, where it has a config.json."""
    path = Path(spec).expanduser()
    return path if (path / "config.json").is_file() else None


def hub_id(spec: str | Path) -> tuple[str, str | None]:
    """Repository and revision of what is no local folder. Raises: ModelError for no hub id."""
    repo, _, revision = str(spec).partition("@")  # a revision may have slashes: refs/pr/3
    is_path = Path(spec).expanduser().exists() or str(spec).startswith((".", "/", "~"))
    if is_path or repo.count("/") != 1:
        raise ModelError(
            f"{spec}: found no config.json there. Wanted the folder of an MLX or Hugging Face "
            "model, or a hub id such as mlx-community/SmolLM2-135M-Instruct."
        )
    return repo, revision or None


def unpinned(spec: str) -> str:
    """A hub id without its revision; what is none stays as it is."""
    try:
        return hub_id(spec)[0] if "@" in spec else spec
    except ModelError:
        return spec


def published(spec: str) -> str | None:
    """The hub id of a model, without its revision; None for a local folder."""
    return None if local_folder(spec) else unpinned(spec)


def reason(error: Exception) -> str:
    """What the hub's client says, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"


def remedy(repo: str, usual: str) -> str:
    """What to do where the hub gave nothing. usual: unless the client is kept off the network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE keeps the hub's client off the network: run without it, or fetch the "
            f"model once without it (`hf download {repo}`), or give a local folder."
        )
    return usual


def shown_size(size: int) -> str:
    """Of a download, for a person."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def at_hand(spec: str | Path) -> Path | None:
    """The folder with a model's config.json on this disk, whether its weights are there or not.

    A local one or the hub's cache; nothing is fetched.
    """
    if (path := local_folder(spec)) is not None:
        return path
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = str(spec).partition("@")
    try:
        found = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    except ValueError:  # no id of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder, under today's names.

    A multimodal one's text part is laid over the top level. Raises: ModelError.
    """
    try:
        config = files.read_object(path / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / 'config.json'} cannot be read: {error}") from error
    inner = config.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ModelError(f"{path / 'config.json'}: wanted a JSON object, as a model folder has it.")
    config = {**config, **inner}
    return todays_names(config)


def todays_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and those of other names under today's too. What has today's name counts."""
    known = {name for name, value in config.items() if value is not None}
    if "hidden_size" in known:
        known -= {"num_heads"}  # Mamba 2's, which are no attention's
    renamed = {
        new: config[name]
        for new, names in OLD_NAMES.items()
        for name in reversed(names)  # the first one stays
        if name in known and new not in known
    }
    return {**config, **renamed}


def size_in(config: Mapping[str, Any], name: str) -> int:
    """A whole number that config.json has to say. Raises: ModelError naming what it lacks."""
    if config.get(name) is None:
        others = " or ".join((name, *OLD_NAMES.get(name, ())))
        raise ModelError(
            f"config.json of this model ({config.get('model_type') or 'of no model_type'}) says no "
            f"{name}, wanted {others}. Add it to the model's config.json."
        )
    return int(config[name])
