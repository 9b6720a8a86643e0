"""Reading the sites of a transformers model with hooks; its modules stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fpo_mlx.errors import ModelError, SaeError
from fpo_mlx.records import Norms, Site, residual_factor, unknown_addition

BLOCKS = ("layers", "h", "blocks")
ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
OUT_PROJ = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True)
class Port:
    """The input or output of a module, times the factor with which it enters the stream."""

    module: nn.Module
    side: str  # "input" | "output"
    factor: float = 1.0


@dataclass(frozen=True)
class Tap:
    """A site: the sum of its ports; `eps` is given where the RMS norm is still to be applied."""

    site: Site
    ports: tuple[Port, ...]
    eps: float | None = None


def find_blocks(model: Any) -> nn.ModuleList:
    """The list of blocks of a causal language model. Raises ModelError when there is none."""
    for root in (_decoder(model), model.base_model):
        for name in BLOCKS:
            found = getattr(root, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise ModelError(
        f"{type(model).__name__} holds no list of blocks that the torch backend can find. "
        "Use --backend mlx."
    )


def _decoder(model: Any) -> Any:
    try:
        return model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model.base_model


def find_tap(model: Any, site: Site) -> Tap:
    """Where to read a site. Raises SaeError when the model has no such block or place."""
    blocks = find_blocks(model)
    if not 0 <= site.layer < len(blocks):
        raise SaeError(
            f"The SAE reads the {site}, but {type(model).__name__} has blocks 0 to "
            f"{len(blocks) - 1}. Use an SAE made for this model, or correct --layer."
        )
    block: Any = blocks[site.layer]
    norms = _norms(block, site)
    factor = residual_factor(model.config.get_text_config().to_dict())
    kind = site.kind
    if kind == "resid_post":
        return Tap(site, (Port(block, "output"),))
    if kind == "resid_pre":
        return Tap(site, (Port(block, "input"),))
    if kind == "mlp_in_unscaled":
        if norms.before_mlp is None:
            raise SaeError(
                f"The {site} cannot be read: no norm of {type(block).__name__} stands before its "
                "MLP. Use an SAE of another site."
            )
        norm = getattr(block, norms.before_mlp)
        return Tap(site, (Port(norm, "input"),), _epsilon(norm, site))
    if kind.startswith("mlp"):
        mlp = _child(block, MLP, site)
        if kind == "mlp_out":
            return Tap(site, (_added(block, mlp, norms.behind_mlp, factor),))
        return Tap(site, (Port(mlp, "input" if kind == "mlp_in" else "output"),))
    attention = _child(block, ATTENTION, site)
    if kind == "attn_z":
        return Tap(site, (Port(_child(attention, OUT_PROJ, site), "input"),))
    if kind == "attn_raw":
        return Tap(site, (Port(attention, "output"),))
    out = _added(block, attention, norms.behind_attention, factor)
    # resid_mid as a sum needs no norm behind it, so it stands for parallel blocks as well
    return Tap(site, (out,) if kind == "attn_out" else (Port(block, "input"), out))


def width_of(tap: Tap) -> int | None:
    """Of an attn_z, for which config.json does not always say it; None where the layer does not."""
    if tap.site.kind != "attn_z":
        return None
    layer: Any = tap.ports[0].module
    return getattr(layer, "in_features", getattr(layer, "nx", None))  # nx: GPT-2's Conv1D


def _norms(block: Any, site: Site) -> Norms:
    """Of a block whose way of adding to its stream is known, so far as this site needs it."""
    children = block.named_children()
    names = {name for name, child in children if not isinstance(child, nn.Identity)}
    # the stream between is read as a sum, of what attention adds
    kind = "attn_out" if site.kind == "resid_mid" else site.kind
    own = names | {name for name, _ in block.named_parameters(recurse=False)}
    if name := unknown_addition(own, kind):
        raise SaeError(
            f"The {site} cannot be read: how a {type(block).__name__} with {name} adds to its "
            "stream is not known here. Use an SAE of resid_post, or of another site."
        )
    return Norms.of(names)


def _added(block: Any, part: nn.Module, norm: str | None, factor: float) -> Port:
    """What a part of the block adds to the stream; norm: the name of the one behind it."""
    return Port(getattr(block, norm) if norm else part, "output", factor)


def _child(module: Any, names: tuple[str, ...], site: Site) -> nn.Module:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name)
    raise SaeError(
        f"The {site} cannot be read: {type(module).__name__} has none of {', '.join(names)}. "
        "Use an SAE of resid_post, or --backend mlx."
    )


def _epsilon(norm: Any, site: Site) -> float:
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name) and not hasattr(norm, "bias"):
            return float(getattr(norm, name))
    raise SaeError(f"The {site} cannot be read: {type(norm).__name__} is no RMS norm.")


def project(tap: Tap, basis: torch.Tensor) -> None:
    """Take the span of orthonormal columns [D, r] out of a site, for good.

    Raises: ModelError where the tapped tensor is not all that the model reads of the site.
    """
    if len(tap.ports) != 1 or tap.eps is not None:
        raise ModelError(
            f"nothing can be projected out of the {tap.site}: the model reads it in more than one "
            "way. Use an SAE of resid_post."
        )
    port = tap.ports[0]

    def changed(value: torch.Tensor) -> torch.Tensor:
        rows = value.float()
        return (rows - (rows @ basis) @ basis.T).to(value.dtype)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else "x"
        return args, {**kwargs, name: changed(kwargs[name])}

    def after(module: nn.Module, args: tuple, out: Any) -> Any:
        return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

    if port.side == "input":
        port.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        port.module.register_forward_hook(after)


class Recorder:
    """Hooks on the ports of some taps; `rows` reads what the last forward pass brought."""

    def __init__(self, taps: tuple[Tap, ...]) -> None:
        self.taps = taps
        self._seen: dict[tuple[nn.Module, str], torch.Tensor] = {}
        for module in {port.module for tap in taps for port in tap.ports}:
            module.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        value = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        self._seen[module, "input"] = value
        self._seen[module, "output"] = out[0] if isinstance(out, tuple) else out

    def rows(self, tap: Tap, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The site at positions `at` (indices into batch and sequence, [R] each) -> [R, D]."""
        parts = []
        for port in tap.ports:
            seen = self._seen[port.module, port.side]
            part = seen.reshape(*_batch_shape(seen, at), seen.shape[-1])[at]
            parts.append(part if port.factor == 1.0 else part * port.factor)
        x = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if tap.eps is None:
            return x
        x = x.float()
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + tap.eps)

    def clear(self) -> None:
        """Let go of the activations."""
        self._seen.clear()


def _batch_shape(seen: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    if seen.ndim == 3:
        return seen.shape[0], seen.shape[1]
    rows = int(at[0].max()) + 1  # a mixture of experts may flatten batch and sequence
    return rows, seen.shape[0] // rows
