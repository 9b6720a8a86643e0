"""Models by their names, for comparison only."""

from __future__ import annotations

import re

from fpo_mlx.storage.hub import unpinned

_STORAGE = re.compile(
    r"-(?:\d+-?bits?|bf16|fp16|fp32|fp8|f16|mxfp\d|nvfp\d|q\d|int[48]|mixed-\d|w\d+a\d+|"
    r"quantized|awq|gptq|gguf|bnb|unsloth|dwq|qat|mlx)\b.*"
)
_NOTHING = re.compile(r"-(?:pt|hf|text(?:-only)?)(?=-|$)")  # spellings that mean no other weights
_KIN = re.compile(r"-(?:instruct|it|base|chat|deduped|v0\.\d)(?=-|$)")
_SHORT = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1"}  # as SAELens calls them


def plain(model: str) -> str:
    """A model's name without owner, revision, storage format and spellings that mean nothing.

    "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit" -> "llama-3.1-8b-instruct".
    """
    last = unpinned(model.replace("\\", "/")).rstrip("/").rsplit("/", 1)[-1]
    name = _STORAGE.sub("", last.lower().replace("_", "-"))
    name = _NOTHING.sub("", name).removeprefix("meta-")
    return _SHORT.get(name, name)


def stem(model: str) -> str:
    """Family and size only: "llama-3.1-8b" of the above, and of its base model."""
    return _KIN.sub("", plain(model))
