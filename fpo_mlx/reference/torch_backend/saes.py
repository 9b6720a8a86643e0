"""The canonical SAE's encoder in torch, float32 whatever the model's dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights, Site

CHUNK_ELEMENTS = 1 << 24  # activations in memory at once: 64 MB in float32
ARRAYS = ("w_enc", "b_enc", "b_in", "threshold", "gate_scale", "gate_bias", "act_scale")


@dataclass(frozen=True)
class TorchSae:
    """`SaeWeights` on a device; `arrays` holds those of `ARRAYS` that the SAE has."""

    weights: SaeWeights
    site: Site
    arrays: dict[str, torch.Tensor]


def on_device(sae: SaeWeights, device: torch.device) -> TorchSae:
    """Raises SaeError when the SAE does not say where it reads."""
    if sae.site is None:
        raise SaeError(
            f"{sae.source or 'The SAE'} does not say which block and site it reads. "
            "Give --layer and --site."
        )
    found = {name: getattr(sae, name) for name in ARRAYS}
    arrays = {
        name: torch.from_numpy(np.array(array, dtype=np.float32)).to(device)
        for name, array in found.items()
        if array is not None
    }
    return TorchSae(sae, sae.site, arrays)


def encode(sae: TorchSae, rows: torch.Tensor) -> torch.Tensor:
    """Feature activations. rows: [R, D] of any float dtype -> float32 [R, F]."""
    arrays, kind = sae.arrays, sae.weights.activation
    x = normalize(rows.float(), sae.weights.normalize)
    raw = (x - arrays["b_in"] if "b_in" in arrays else x) @ arrays["w_enc"]  # [R, F]
    pre = raw + arrays["b_enc"]
    if kind == "gated":
        scale = arrays.get("gate_scale")
        magnitude = (raw if scale is None else raw * scale) + arrays["b_enc"]
        acts = magnitude.relu() * (raw + arrays["gate_bias"] > 0)
    else:
        acts = activate(sae.weights, pre, arrays.get("threshold"))
    return acts * arrays["act_scale"] if "act_scale" in arrays else acts


def activate(sae: SaeWeights, pre: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
    """A of `SaeWeights` for all but the gated kind. pre: [R, F] -> [R, F]."""
    kind, k = sae.activation, sae.k or 0
    if kind == "identity":
        return pre
    if kind == "relu":
        return pre.relu()
    if kind == "jumprelu":
        assert threshold is not None  # the readers of SAE files see to it
        return pre.relu() * (pre > threshold)
    if kind in ("topk", "abstopk"):
        by = pre.abs() if kind == "abstopk" else pre
        top = by.topk(min(k, pre.shape[-1]), dim=-1).indices
        kept = torch.zeros_like(pre).scatter(-1, top, pre.gather(-1, top))
        return kept if kind == "abstopk" else kept.relu()
    if kind == "groupmax":
        groups = pre.relu().unflatten(-1, (k, -1))  # [R, k, F / k]
        best = groups.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best, groups.gather(-1, best)).flatten(-2)
    raise SaeError(f"The torch backend does not know SAEs of the kind {kind!r}.")


def normalize(x: torch.Tensor, mode: str) -> torch.Tensor:
    """N of `SaeWeights`. x: [R, D] -> [R, D]."""
    if mode == "layer_norm":
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=1) + 1e-5)
    if mode == "constant_norm":
        return x * (math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True))
    return x


def refuse_width(sae: TorchSae, width: int) -> None:
    """Raises SaeError where the site's vectors are not of the width that the SAE reads."""
    if width != sae.weights.d_in:
        raise SaeError(
            f"{sae.weights.source or 'The SAE'} reads vectors of width {sae.weights.d_in}, but the "
            f"{sae.site} of this model has width {width}. Use an SAE made for this model."
        )


def pooled(sae: TorchSae, rows: torch.Tensor) -> torch.Tensor:
    """Mean activation over the rows of one response. rows: [R, D] -> float32 [F].

    Raises SaeError when the SAE's width is not the site's.
    """
    refuse_width(sae, rows.shape[-1])
    size = max(1, CHUNK_ELEMENTS // sae.weights.n_features)
    parts = [encode(sae, chunk).sum(dim=0) for chunk in rows.split(size)]
    return torch.stack(parts).sum(dim=0) / len(rows)
