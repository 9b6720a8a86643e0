"""The oracle's view into a transformers model: where its blocks are, what each site's tensor is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fpo_mlx.records import Site

Tokens = Sequence[int] | np.ndarray
F64 = torch.float64
ATTENTIONS = ("self_attn", "attn", "attention", "linear_attn")
OUT_PROJECTIONS = (
    "self_attn.o_proj", "attn.c_proj", "attention.dense", "linear_attn.out_proj",
)  # fmt: skip
# what attention and MLP give is normed before it is added to the stream
POST_NORMED = ("gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "olmo2")
WITHOUT_RMS_NORM = ("olmo2", "gpt2", "gpt_neox", "cohere2")  # before the MLP


class NoDownCast(TorchFunctionMode):
    """transformers casts norms, softmax and rotary angles to float32; here they stay float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(F64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: F64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def torch_path(model: Any, mlx_path: str) -> str:
    """mlx-lm's module path as transformers spells it (they differ for a few)."""
    blocks = {"gpt2": "transformer.h.", "gpt_neox": "gpt_neox.layers."}
    mlx_path = mlx_path.replace("language_model.model.", "model.language_model.", 1)  # a wrapper
    return mlx_path.replace("model.h.", blocks.get(model.config.model_type, "model.h."), 1)


def hidden_and_logits(
    model: Any, tokens: Tokens, *sites: Site
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run one sequence. tokens: [L]. Returns the activation at each site [L, .], logits [L, V]."""
    seen: dict[tuple[int, str], Any] = {}
    hooks = [hook for layer in {s.layer for s in sites} for hook in _watch(model, layer, seen)]
    try:
        with NoDownCast():
            logits = model(torch.tensor(np.array(tokens))[None].long(), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [_at_site(model, site, seen)[0] for site in sites], logits


def _blocks(model: Any) -> Any:
    for path in ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers"):
        with contextlib.suppress(AttributeError):
            return model.get_submodule(path)
    raise NotImplementedError(f"the oracle does not know where {type(model)} keeps its blocks")


def _watch(model: Any, layer: int, seen: dict[tuple[int, str], Any]) -> list[Any]:
    """Note the input and output of the block and of every module in it, by name."""

    def hook_for(name: str) -> Callable[..., None]:
        def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            seen[layer, f"{name}:in"] = args[0] if args else kwargs.get("hidden_states")
            seen[layer, f"{name}:out"] = output[0] if isinstance(output, tuple) else output

        return note

    named = _blocks(model)[layer].named_modules()
    return [m.register_forward_hook(hook_for(name), with_kwargs=True) for name, m in named]


def has_rms_norm(model: Any) -> bool:
    """Whether the MLP reads an RMS-normed stream."""
    return model.config.model_type not in WITHOUT_RMS_NORM


def _at_site(model: Any, site: Site, seen: Mapping[tuple[int, str], Any]) -> torch.Tensor:
    def of(*names: str) -> torch.Tensor:
        return next(seen[site.layer, name] for name in names if (site.layer, name) in seen)

    family, factor = model.config.model_type, getattr(model.config, "residual_multiplier", 1.0)
    post_normed, out = family in POST_NORMED, tuple(f"{name}:out" for name in ATTENTIONS)

    def attn_out() -> torch.Tensor:
        return of("post_attention_layernorm:out") if post_normed else factor * of(*out)

    if site.kind in ("resid_pre", "resid_mid"):
        return of(":in") if site.kind == "resid_pre" else of(":in") + attn_out()
    if site.kind == "resid_post":
        return of(":out")
    if site.kind == "attn_z":
        return of(*(f"{name}:in" for name in OUT_PROJECTIONS))
    if site.kind in ("attn_raw", "attn_out"):
        return of(*out) if site.kind == "attn_raw" else attn_out()
    if site.kind in ("mlp_in", "mlp_raw"):
        return of("mlp:in" if site.kind == "mlp_in" else "mlp:out")
    if site.kind == "mlp_out":
        return of("post_feedforward_layernorm:out") if post_normed else factor * of("mlp:out")
    if not has_rms_norm(model):
        raise NotImplementedError(f"{family} has no RMS norm before its MLP")
    x = of("pre_feedforward_layernorm:in", "post_attention_layernorm:in")  # mlp_in_unscaled
    return x / torch.sqrt(
        (x * x).mean(-1, keepdim=True) + model.config.get_text_config().rms_norm_eps
    )
