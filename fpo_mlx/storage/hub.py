"""Model folders and the hub: names to local files. Needs neither mlx nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ModelError
from fpo_mlx.storage import files

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "*.tiktoken"]
WEIGHT_FILES = ["*.safetensors"]

# what GPT-2 and Lille, OpenELM, AFM 7, phixtral and EXAONE call otherwise than all others
OLD_NAMES = {
    "hidden_size": ("n_embd", "model_dim", "hidden_dim"),
    "num_hidden_layers": ("n_layer", "num_transformer_layers", "num_layers"),
    "num_attention_heads": ("n_head", "num_query_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads"),
    "vocab_size": ("num_vocab",),
}
NO_CODE = ["*.py", "*.pyc", "*.so", "*.sh"]  # "tokenizer*" would let tokenizer_x.py in
TWICE = ["consolidated*.safetensors"]  # Mistral's second copy of the weights, which nothing reads


def resolve_model(spec: str | Path, *, weights: bool = True) -> Path:
    """A local folder as it is; else a hub id `owner/name[@revision]`, fetched without code files.

    weights: False where settings and tokenizer are all that is read.
    Raises: ModelError when neither can be had.
    """
    path = Path(spec).expanduser()
    if (path / "config.json").is_file():
        return path
    repo, _, revision = str(spec).partition("@")  # a revision may have slashes: refs/pr/3
    if path.exists() or repo.count("/") != 1 or str(spec).startswith((".", "/", "~")):
        raise ModelError(
            f"{spec}: found no config.json there. Wanted the folder of an MLX or Hugging Face "
            "model, or a hub id such as mlx-community/SmolLM2-135M-Instruct."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, ignore_patterns=[*NO_CODE, *TWICE],
                allow_patterns=[*SMALL_FILES, *(WEIGHT_FILES if weights else ())],
            )
        )  # fmt: skip
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes
        why = next(iter(str(error).splitlines()), "no reason given")
        raise ModelError(
            f"{spec}: neither a local folder nor a model that could be downloaded "
            f"({type(error).__name__}: {why}). Check the spelling, the network and HF_TOKEN, or "
            "give a local folder."
        ) from error


def at_hand(spec: str | Path) -> Path | None:
    """The folder with a model's config.json on this disk, whether its weights are there or not.

    A local one or the hub's cache; nothing is fetched.
    """
    path = Path(spec).expanduser()
    if (path / "config.json").is_file():
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
