"""A head that is one matrix, plain or packed: logits, and what pulls on the rows behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx


@partial(mx.compile, shapeless=True)
def _capped(logits, cap):
    return cap * mx.tanh(logits / cap)


@partial(mx.compile, shapeless=True)
def _uncapped(slopes, logits, cap):
    """Slopes of the capped logits -> of those before the cap."""
    return slopes * (1.0 - mx.square(logits / cap))


@dataclass(frozen=True)
class Packing:
    """How a quantised matrix is stored; its first axis is the plain one's."""

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    def tile(self, columns: slice) -> Packing:
        biases = None if self.biases is None else self.biases[columns]
        return Packing(self.scales[columns], biases, self.group_size, self.bits, self.mode)

    def widened(self) -> Packing:
        """Scales in float32, but those that are 8-bit numbers of their own (mxfp4, nvfp4)."""
        if self.biases is None:
            return self
        scales, biases = (a.astype(mx.float32) for a in (self.scales, self.biases))
        return replace(self, scales=scales, biases=biases)

    def multiply(self, rows: mx.array, weight: mx.array, *, transpose: bool) -> mx.array:
        options: dict[str, Any] = {
            "transpose": transpose, "group_size": self.group_size, "bits": self.bits,
            "mode": self.mode,
        }  # fmt: skip
        return mx.quantized_matmul(rows, weight, self.scales, self.biases, **options)


@dataclass(frozen=True)
class LinearHead:
    """logits = cap * tanh(scale * (h W^T + b) / cap); without a cap the inner part alone."""

    weight: mx.array  # [V, D], or packed
    bias: mx.array | None = None  # [V]
    packing: Packing | None = None
    scale: float = 1.0
    cap: float = 0.0  # 0: none

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def half(self) -> bool:
        """Whether it is a plain matrix of fewer than 32 bits a value."""
        return self.packing is None and self.weight.dtype != mx.float32

    def widened(self) -> LinearHead:
        """The head of the same values in float32; what is packed stays packed."""
        if self.packing is None:
            return replace(self, weight=self.weight.astype(mx.float32))
        return replace(self, packing=self.packing.widened())

    def tile(self, columns: slice) -> LinearHead:
        """The head of these logits only."""
        return LinearHead(
            self.weight[columns],
            None if self.bias is None else self.bias[columns],
            None if self.packing is None else self.packing.tile(columns),
            self.scale,
            self.cap,
        )

    def __call__(self, rows: mx.array) -> mx.array:
        """rows: [r, D] -> logits [r, V], in the wider dtype of rows and matrix."""
        logits = self._multiply(rows, transpose=True)
        return self.finished(logits if self.bias is None else logits + self.bias)

    def finished(self, products: mx.array) -> mx.array:
        """Scale and cap, of products with the matrix that have their bias. Any shape."""
        logits = products if self.scale == 1.0 else products * self.scale
        return _capped(logits, self.cap) if self.cap else logits

    def back(self, slopes: mx.array, logits: mx.array) -> mx.array:
        """d(sum slopes * logits) / d rows. slopes, logits: float32 [r, V] -> [r, D]."""
        if self.cap:
            slopes = _uncapped(slopes, logits, self.cap)
        out = self._multiply(slopes, transpose=False)
        return out if self.scale == 1.0 else out * self.scale

    def _multiply(self, rows: mx.array, *, transpose: bool) -> mx.array:
        if self.packing is not None:
            return self.packing.multiply(rows, self.weight, transpose=transpose)
        return rows @ (self.weight.T if transpose else self.weight)

    def slope_of(self, targets: mx.array, logits: mx.array) -> mx.array:
        """d logits[target] / d rows. targets, logits: [r] -> [r, D] float32."""
        weight = mx.take(self.weight, targets, axis=0)
        packing = self.packing
        if packing is not None:
            biases = None if packing.biases is None else mx.take(packing.biases, targets, axis=0)
            scales = mx.take(packing.scales, targets, axis=0)
            weight = mx.dequantize(
                weight, scales, biases, packing.group_size, packing.bits, packing.mode
            )
        slope = weight.astype(mx.float32) * self.scale
        return slope * (1.0 - (logits / self.cap) ** 2)[:, None] if self.cap else slope
