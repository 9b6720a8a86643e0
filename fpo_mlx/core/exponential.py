"""exp(values - top), fast on a CPU too.

MLX's exp takes 13 ns an element on an x86 CPU and is off by 2e-6; a vocabulary's worth of it for
every response token is a fifteenth of a training step. A polynomial that the compiler turns into
vector code takes 3 ns and is off by 1e-7. (On a GPU the built-in is the fast one.)

Source: range reduction and coefficients of Cephes' expf (Moshier 1992).
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

LEAST = -87.0  # exp of less is no normal float32: it gives exp(-87) = 1.6e-38 instead
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # k * high is exact for |k| < 2^13
_TO_INTEGER = 12582912.0  # 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip


def exp_below(values: mx.array, top: mx.array) -> mx.array:
    """exp(values - top) where values <= top. Float32, broadcast; not differentiable."""
    fraction, shifted = _reduce(values, top)
    return _scale(fraction.view(mx.int32), shifted.view(mx.int32)).view(mx.float32)


@partial(mx.compile, shapeless=True)
def _reduce(values, top):
    """(exp of the fraction, float with the power of two in its low bits)."""
    x = mx.maximum(values - top, LEAST)
    shifted = x * _LOG2E + _TO_INTEGER
    k = shifted - _TO_INTEGER
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p = mx.array(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = p * r + coefficient
    return p * r * r + r + 1.0, shifted


@partial(mx.compile, shapeless=True)
def _scale(fraction, shifted):
    """Adds the power of two to the exponent."""
    return fraction + (shifted << 23)
