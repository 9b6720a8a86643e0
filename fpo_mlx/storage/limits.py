"""What a model's weights can take, read from the headers of its files: no weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.storage.files import known_object, listed
from fpo_mlx.storage.tensors import read_header

# the last parts of the names under which architectures keep these matrices
_TOKENS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head",
           "embed_out")  # fmt: skip
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
NOT_TEXT = ("vision", "visual", "audio", "image")  # in names of towers, beside a text model
_OPT_OFFSET = 2  # OPT's table of positions begins with two rows that no token has


@dataclass(frozen=True)
class ModelLimits:
    """None where the folder does not say."""

    vocabulary: int | None = None  # rows of the embedding and of the head: ids are below
    positions: int | None = None  # rows of a learned table of positions
    trained: int | None = None  # tokens that the model saw at once in training (RoPE goes on)


def model_limits(folder: Path) -> ModelLimits:
    """Of a model folder; what cannot be read is left to whoever loads the weights."""
    config = _config(folder)
    rows: dict[str, list[int]] = {"tokens": [], "positions": []}
    for name, shape in _shapes(folder):
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if not name.endswith(".weight") or len(shape) != 2 or any(w in name for w in NOT_TEXT):
            continue
        if part in _TOKENS:
            rows["tokens"].append(shape[0])
        elif part in _POSITIONS:
            rows["positions"].append(shape[0])
    stated = config.get("vocab_size")
    vocabulary = min(rows["tokens"], default=stated if type(stated) is int else None)
    offset = _OPT_OFFSET if config.get("model_type") == "opt" else 0
    positions = min(rows["positions"], default=None)
    trained = config.get("max_position_embeddings")
    scaled = config.get("rope_scaling") or config.get("rope_parameters", {}).get("factor")
    return ModelLimits(
        vocabulary,
        None if positions is None else positions - offset,
        trained if type(trained) is int and positions is None and not scaled else None,
    )


def _config(folder: Path) -> dict[str, Any]:
    config = known_object(folder / "config.json")
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    parameters = config.get("rope_parameters")
    return {**config, "rope_parameters": parameters if isinstance(parameters, Mapping) else {}}


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of a model folder."""
    named = listed(folder, "model*.safetensors")
    every = (p for p in listed(folder, "*.safetensors") if "adapters" not in p.name)
    for path in named or every:
        try:
            tensors = read_header(path).tensors
        except (OSError, ValueError):
            continue
        for name, tensor in tensors.items():
            yield name, tensor.shape
