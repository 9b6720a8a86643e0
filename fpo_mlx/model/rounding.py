"""What rounding to few bits, or to half precision, leaves of an adapter's change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fpo_mlx.model.trees import arrays_of

AFFINE_LEAST = 32  # values of a group


@dataclass(frozen=True)
class Kept:
    """Over all fused layers of less than float32. D: fused - base weights before rounding.

    bits: of quantised layers, or 16; share: <E, D> / <D, D> of the change E after rounding;
    error: |E - D| / |D|.
    """

    share: float
    error: float
    bits: tuple[int, ...]

    @staticmethod
    def of(sums: Sequence[tuple[float, float, float, int]]) -> Kept | None:
        """sums: (<E, D>, |E - D|^2, |D|^2, bits) of each layer. None without a change."""
        along, off, size = (sum(part[i] for part in sums) for i in range(3))
        if not size:
            return None
        return Kept(along / size, (off / size) ** 0.5, tuple(sorted({part[3] for part in sums})))


@dataclass(frozen=True)
class Raised:
    """Fused layers that have more bits than their base's, and the bytes that this adds."""

    layers: int
    bits: int
    base_bits: tuple[int, ...]  # ascending
    added: int


def can_have(base: Any, bits: int) -> bool:
    """Whether a linear layer is quantised to fewer bits, and its rows make groups for so many."""
    if not isinstance(base, nn.QuantizedLinear) or base.bits >= bits:
        return False
    return base.scales.shape[-1] * base.group_size % _group(base) == 0


def _group(base: Any) -> int:
    """The values of a group at other bits: nvfp4's are smaller than affine's."""
    return max(base.group_size, AFFINE_LEAST)


def stored_bytes(layer: Any, stored: mx.Dtype | None) -> int:
    """Of a layer's arrays, its floats in that type; None: in their own."""
    return sum(
        v.size * (stored if stored and mx.issubdtype(v.dtype, mx.floating) else v.dtype).size
        for _, v in arrays_of(layer.parameters())
    )


def plain_weight(layer: Any) -> mx.array:
    """[.., out, in] in float32, whatever the layer stores; scales are widened before they multiply.

    mlx-lm's own dequantising rounds to the half precision in which scales are stored.
    """
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    form = (layer.group_size, layer.bits, layer.mode)
    if "global_scale" in layer:  # [E], of each expert one (nvfp4)
        parts = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
        return mx.stack([mx.dequantize(w, s, None, *form, g, mx.float32) for w, s, g in parts])
    scales, biases = layer.scales, None
    if "biases" in layer:
        scales, biases = scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, *form).astype(mx.float32)


def is_plain(adapted: Any) -> bool:
    """Whether it is a single linear layer that is adapted; no embedding, no block of experts."""
    return "linear" in adapted and adapted.lora_a.ndim == 2


def change_of(adapted: Any) -> mx.array | None:
    """What an adapted layer adds to its weight, [.., out, in] in float32; None for an embedding."""
    if "linear" not in adapted:
        return None
    if not is_plain(adapted):  # [E, out, r] and [E, r, in], of each expert its own
        return (adapted.scale * adapted.lora_b.astype(mx.float32)) @ adapted.lora_a.astype(
            mx.float32
        )
    delta = (adapted.scale * adapted.lora_b.T.astype(mx.float32)) @ adapted.lora_a.T.astype(
        mx.float32
    )
    if "m" not in adapted:
        return delta
    base = plain_weight(adapted.linear)
    whole = base + delta
    return (adapted.m / mx.linalg.norm(whole, axis=1))[:, None] * whole - base


def rounded_to(base: Any, change: mx.array, bits: int | None) -> Any:
    """A layer of base + change, quantised as the base is, or to so many bits if it can be."""
    weight = plain_weight(base) + change
    if weight.ndim == 3:
        return _experts(base, weight)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if "bias" in base:
        layer.bias = base.bias
    if not isinstance(base, nn.QuantizedLinear):
        return layer
    if bits is not None and can_have(base, bits):
        return nn.QuantizedLinear.from_linear(layer, _group(base), bits, mode="affine")
    return nn.QuantizedLinear.from_linear(layer, base.group_size, base.bits, mode=base.mode)


def _experts(base: Any, weight: mx.array) -> Any:
    """A block of experts of these weights [E, out, in], quantised as the base is.

    mlx-lm's own fuse leaves out the scale that each expert of nvfp4 may have.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    layer = SwitchLinear(1, 1, 1, bias=False)
    layer.weight = weight
    if "bias" in base:
        layer.bias = base.bias
    if "scales" not in base:
        return layer
    own = {"global_scale": True} if "global_scale" in base else {}
    return layer.to_quantized(base.group_size, base.bits, base.mode, **own)


def is_rounded(fused: Any) -> bool:
    """Whether the weight is stored in fewer than 32 bits."""
    return fused.weight.dtype != mx.float32  # what is packed is integers


def kept_of(base: Any, change: mx.array, fused: Any) -> tuple[float, float, float, int]:
    """(<E, D>, |E - D|^2, |D|^2, bits) of one layer."""
    after = plain_weight(fused) - plain_weight(base)
    off = after - change
    sums = [(after * change).sum(), (off * off).sum(), (change * change).sum()]
    mx.eval(sums)
    along, error, size = (float(value) for value in sums)
    return along, error, size, getattr(fused, "bits", 16)
