"""How u becomes a loss: one function per link, and the table of them.

A link takes the chosen r and the rejected r of `core.objectives`, each [B], whose difference is u,
then beta and what is its own. Swapping the two responses gives link(-u).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn


def _sigmoid(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """-log sigmoid(u). DPO (arXiv 2305.18290), Eq. 7."""
    return -nn.log_sigmoid(chosen - rejected)


def _ipo(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """(u / beta - 1 / (2 beta))^2. IPO (arXiv 2310.12036), Eq. 17, tau = beta."""
    return mx.square((chosen - rejected - 0.5) / beta)


def _hinge(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """max(0, 1 - u). SLiC (arXiv 2305.10425); to a reference as in RSO (2309.06657), Eq. 11."""
    return mx.maximum(1.0 - (chosen - rejected), 0.0)


def _ada(
    chosen: mx.array, rejected: mx.array, beta: float, *, tau_min: float, tau_max: float, rho: float
) -> mx.array:
    """min over tau in [tau_min, tau_max] of -tau log sigmoid(u / tau) + (rho - ln 2) tau.

    The minimum lies at |u| / s, s of `scale_of`; its slope in u is the one at fixed tau.
    Adaptive Preference Scaling (arXiv 2406.02764), Eq. 7.
    """
    u = chosen - rejected
    tau = mx.stop_gradient(mx.clip(mx.abs(u) / scale_of(rho), tau_min, tau_max))
    return (rho - math.log(2)) * tau - tau * nn.log_sigmoid(u / tau)


@lru_cache
def scale_of(rho: float) -> float:
    """s > 0 with KL(Bern(sigmoid(s)) || Bern(1/2)) = rho, 0 < rho < ln 2, by bisection."""
    low, high = 0.0, 64.0
    for _ in range(200):
        middle = (low + high) / 2
        p = 1.0 / (1.0 + math.exp(-middle))
        entropy = -math.log(p) + middle * (1.0 - p)  # of Bern(p), nats
        low, high = (middle, high) if math.log(2) - entropy < rho else (low, middle)
    return high


def _sail(
    chosen: mx.array, rejected: mx.array, beta: float, *, rho: float, share: float
) -> mx.array:
    """x - rho / 2 m x^2, x = -log sigmoid(u), m a coin that falls 1 at rate `share`.

    The coin's mean stands for the coin: the loss is linear in it, so the expected gradient is the
    same and no draw is needed. SAIL (arXiv 2406.15567), its DDP form.
    """
    x = -nn.log_sigmoid(chosen - rejected)
    return x - 0.5 * rho * share * mx.square(x)


def _apo_zero(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """1 - sigmoid(r_w) + sigmoid(r_l). APO (arXiv 2408.06266), Eq. 7, plus a constant 1."""
    return mx.sigmoid(-chosen) + mx.sigmoid(rejected)


def _apo_down(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """sigmoid(r_w) + 1 - sigmoid(u). APO (arXiv 2408.06266), Eq. 8, plus a constant 1."""
    return mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen)


def _each(chosen: mx.array, rejected: mx.array, beta: float) -> mx.array:
    """-log sigmoid(r_w) - log sigmoid(-r_l): each response for itself. ASFT (arXiv 2409.10571)."""
    return -nn.log_sigmoid(chosen) - nn.log_sigmoid(-rejected)


LINKS: dict[str, Callable[..., mx.array]] = {
    "sigmoid": _sigmoid, "ipo": _ipo, "hinge": _hinge, "ada": _ada, "sail": _sail,
    "apo-zero": _apo_zero, "apo-down": _apo_down, "each": _each,
}  # fmt: skip
