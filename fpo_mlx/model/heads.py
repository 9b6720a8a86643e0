"""The map from the final hidden state to logits: any model's own, or the one matrix that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fpo_mlx.core.linear_head import LinearHead, Packing
from fpo_mlx.core.logprobs import Head
from fpo_mlx.errors import ModelError
from fpo_mlx.model.taps import swap_call
from fpo_mlx.model.trees import blocks_of, float_dtype

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
LINEARS = (nn.Linear, nn.QuantizedLinear)
AGREES = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 3e-2}  # of the largest logit


class ReplayedHead:
    """The model's own map from the final hidden state to logits, soft-caps and scales included.

    The model is called as usual, but its backbone answers with the hidden rows it is given.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        self._model = model
        # not on self: the backbone's class would hold this object, and it the model, in a cycle
        self._replay: list[mx.array] = []
        replay = self._replay
        swap_call(backbone, lambda original, *a, **k: replay[0] if replay else original(*a, **k))

    def __call__(self, rows: mx.array) -> mx.array:
        """rows: [r, D] -> logits [r, V]."""
        self._replay.append(rows[None])
        try:
            return self._model(mx.zeros((1, rows.shape[0]), dtype=mx.int32))[0]
        finally:
            self._replay.clear()


def find_backbone(model: nn.Module) -> nn.Module:
    """The module that owns the list of blocks and applies the final norm."""
    first = blocks_of(model)[0]
    owners = [
        module
        for _, module in model.named_modules()
        if module is not model
        and any(isinstance(v, list) and v and v[0] is first for v in module.values())
    ]
    if not owners:
        raise ModelError(f"{type(model).__module__}: found no module that holds the blocks")
    return owners[-1] if len(owners) == 1 else min(owners, key=lambda m: len(m.named_modules()))


def split(model: nn.Module, config: Mapping[str, Any]) -> tuple[Callable[..., mx.array], Head]:
    """The model in two: tokens [n, L] (and caches) -> hidden [n, L, D], and the head after it."""
    backbone = find_backbone(model)
    for _, module in backbone.named_modules():
        if type(module) in LINEARS and _is_output(module, vocab_size(model, config)):
            return _without(backbone, module), _head_of(module)[0]
    return backbone, find_head(model, backbone, config)


def _without(backbone: nn.Module, output: nn.Module) -> Callable[..., mx.array]:
    """A backbone that ends in its own output layer (GPT-NeoX), without that layer."""
    skipping: list[bool] = []
    swap_call(output, lambda original, rows: rows if skipping else original(rows))

    def hidden(tokens: mx.array, cache: Any = None) -> mx.array:
        skipping.append(True)
        try:
            return backbone(tokens, cache=cache)
        finally:
            skipping.clear()

    return hidden


def find_head(model: nn.Module, backbone: nn.Module, config: Mapping[str, Any]) -> Head:
    """A `LinearHead` where one agrees with the model's own logits, else the model's own.

    Whether it agrees is measured, on a few rows of two sizes so that a soft-cap shows; so a model
    that does something else to its logits is never mistaken.
    """
    replayed = ReplayedHead(model, backbone)
    if _adapted(model, config):  # what a small adapter adds is less than what is allowed
        return replayed
    for module in _outputs(model, config):
        plain, width = _head_of(module)
        rows = mx.random.normal((4, width), key=mx.random.key(0))
        rows = (rows * mx.array([[1.0], [1.0], [30.0], [30.0]])).astype(float_dtype(model))
        try:
            wanted = replayed(rows).astype(mx.float32)
        except ValueError:  # of another width: Gemma 4 has a second embedding of the vocabulary
            continue
        # of the finite ones: no matrix gives the -inf of ids that are no tokens (Phi-3-small)
        size = mx.where(mx.isfinite(wanted), mx.abs(wanted), 0.0).max()
        allowed = AGREES.get(rows.dtype, 1e-4) * size
        for scale, cap in _numbers(model, config):
            head = replace(plain, scale=scale, cap=cap)
            got = head(rows)
            if got.shape == wanted.shape and bool((mx.abs(got - wanted).max() <= allowed).item()):
                return head
    return replayed


def vocab_size(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Rows of the head. The published files of Gemma 3 leave it to the model's own defaults."""
    stated = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(stated or getattr(getattr(model, "args", None), "vocab_size", None) or 0)


def half_head(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether the logits come from a plain matrix of fewer than 32 bits a value."""
    outputs = _outputs(model, config)
    return bool(outputs) and "scales" not in outputs[0] and outputs[0]["weight"].dtype != mx.float32


def _outputs(model: nn.Module, config: Mapping[str, Any]) -> list[nn.Module]:
    """Those of the model that could be its head: output layers first."""
    vocab = vocab_size(model, config)
    found = [m for _, m in model.named_modules() if _is_output(m, vocab)]
    return sorted(found, key=lambda m: isinstance(m, EMBEDDINGS))


def _adapted(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether an adapter lies on a layer that could be the head."""
    vocab = vocab_size(model, config)
    layers = [module for module in model.modules() if "lora_a" in module]
    return any(_is_output(inner, vocab) for layer in layers for inner in layer.values())


def _is_output(module: Any, vocab: int) -> bool:
    """Whether it has one row for each entry of the vocabulary."""
    return type(module) in (*EMBEDDINGS, *LINEARS) and module["weight"].shape[0] == vocab


def _head_of(module: nn.Module) -> tuple[LinearHead, int]:
    """The layer as a head, and D."""
    weight, packing = module["weight"], None
    width = weight.shape[1]
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        biases = module.get("biases")
        packing = Packing(module["scales"], biases, module.group_size, module.bits, module.mode)
        width = width * 32 // module.bits
    bias = module.get("bias")
    return LinearHead(weight, bias, packing), width


def _numbers(model: nn.Module, config: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(scale, cap) as models name them: Cohere multiplies, Granite divides, Gemma caps."""
    defaults = getattr(getattr(model, "args", None), "__dict__", {})  # what config.json left out
    known: dict[str, Any] = {}
    for source in (defaults, config.get("text_config") or {}, config):
        known.update({k: v for k, v in source.items() if v is not None})
    scales = [1.0]
    if known.get("logit_scale"):
        scales.append(float(known["logit_scale"]))
    if known.get("logits_scaling"):
        scales.append(1.0 / float(known["logits_scaling"]))
    cap = float(known.get("final_logit_softcapping") or 0.0)
    return [(scale, c) for scale in scales for c in dict.fromkeys((cap, 0.0))]
