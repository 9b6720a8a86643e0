"""How well an SAE reads the activations that a model has: figures, and what they tell.

Definitions, over the N vectors x of the tokens that were looked at and their reconstructions r:
  L0     mean number of features that are not 0
  FVU    fraction of variance unexplained, sum |x - r|^2 / sum |x - mean(x)|^2: one ratio of sums
         over all tokens and coordinates, with the mean over the tokens (Gao et al. 2024,
         arXiv 2406.04093, call it normalised MSE); 0 is perfect, 1 as good as the mean
  gain   the factor on (r - mean(r)) that fits (x - mean(x)) best in least squares; 1 is right
  dead   share of the features that were 0 on every token: of few tokens it says little
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.encode import ROWS, encode_tiles, restored

ALIKE = 1e-12  # of sum |x|^2: below it the variance is what rounding leaves of equal vectors
_ELEMENTS = 1 << 24  # activations alive at once: 64 MiB in float32


@dataclass(frozen=True)
class FitSums:
    """What the figures are made of; sums of parts of the data add up. float64."""

    tokens: int
    active: np.ndarray  # [F], tokens on which a feature is not 0
    x: np.ndarray  # [D], sum of x
    xx: float  # sum of |x|^2
    r: np.ndarray | None = None  # [D], sum of r; None where nothing can be reconstructed
    rr: float = 0.0
    xr: float = 0.0
    error: float = 0.0  # sum of |x - r|^2

    def __add__(self, other: FitSums) -> FitSums:
        return FitSums(
            self.tokens + other.tokens,
            self.active + other.active,
            self.x + other.x,
            self.xx + other.xx,
            None if self.r is None or other.r is None else self.r + other.r,
            self.rr + other.rr,
            self.xr + other.xr,
            self.error + other.error,
        )


@dataclass(frozen=True)
class FitFigures:
    """See the top of this module. None: not to be had of this SAE, `why_not` says why."""

    tokens: int
    l0: float
    dead: float
    fvu: float | None = None
    gain: float | None = None
    why_not: str = ""


def reconstructs(sae: SaeWeights) -> str:
    """ "" if the SAE gives back its own input, else why it does not, as half a sentence."""
    if sae.transcoder:
        return "a transcoder predicts another place than the one it reads"
    if sae.w_dec is None or sae.b_dec is None:
        return f"a {sae.format} SAE comes without a decoder of its own site"
    return ""


def measure(sae: SaeWeights, x: np.ndarray) -> FitSums:
    """The sums over x [N, D_in]. Raises SaeError for another width or values that are not finite.

    Works through a bounded number of rows and features at a time; each tile of the SAE is read
    once for all of these rows, so that its matrices may lie on the disk.
    """
    if not np.isfinite(x).all():
        raise SaeError(
            f"{sae.source or 'SAE'}: the model's activations at the {sae.site} are not all finite. "
            "The model, or its adapter, is damaged."
        )
    parts = [_measure(sae, x[at : at + ROWS]) for at in range(0, max(len(x), 1), ROWS)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _measure(sae: SaeWeights, x: np.ndarray) -> FitSums:
    w_dec = None if reconstructs(sae) else sae.w_dec
    active, wide = np.zeros(sae.n_features), x.astype(np.float64)
    decoded = np.zeros((len(x), 0 if w_dec is None else w_dec.shape[1]), np.float32)
    for tile, acts in encode_tiles(sae, x, _ELEMENTS // max(len(x), 1)):
        active[tile] = (acts != 0).sum(axis=0)
        if w_dec is not None:
            decoded += acts @ w_dec[tile]
    sums = FitSums(len(x), active, wide.sum(axis=0), _dot(wide, wide))
    if w_dec is None:
        return sums
    r = restored(sae, decoded, x).astype(np.float64)  # [n, D]
    error = wide - r
    return FitSums(
        sums.tokens, sums.active, sums.x, sums.xx,
        r.sum(axis=0), _dot(r, r), _dot(wide, r), _dot(error, error),
    )  # fmt: skip


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b))


def figures(sums: FitSums, why_not: str = "") -> FitFigures:
    """The figures of the sums; why_not: what `reconstructs` says of the SAE."""
    n = max(sums.tokens, 1)
    l0, dead = float(sums.active.sum()) / n, float((sums.active == 0).mean())
    variance = sums.xx - _dot(sums.x, sums.x) / n
    if sums.r is None or variance <= ALIKE * sums.xx:
        return FitFigures(sums.tokens, l0, dead, why_not=why_not or "x does not vary")
    spread = sums.rr - _dot(sums.r, sums.r) / n
    shared = sums.xr - _dot(sums.x, sums.r) / n
    gain = shared / spread if spread > 1e-12 * variance else None
    return FitFigures(sums.tokens, l0, dead, sums.error / variance, gain)


# Measured on SmolLM2-135M with a TopK and a JumpReLU SAE of 4,096 features for the stream after
# block 27, on 14 whole chats and on 40 answers. L0 is the JumpReLU's over the stated 32:
#                         FVU           gain          L0
#   their own place       0.36 to 0.51  0.81 to 0.99  1.03 to 1.07
#   block 26              0.50 to 0.73  0.74 to 0.95  0.68 to 0.74
#   block 28              0.52 to 0.71  0.61 to 0.91  2.1 to 2.4
#   the MLP's output      3.9 to 8.1    0.26 to 0.28  2.9
#   inputs at half scale  0.92 to 1.6   0.71 to 0.78  0.25
# So a TopK SAE one block off is in bounds by every figure alone; the comparison with the places
# around finds it. RECOVERED_LOW was not measured: with zeros as ablation, block 26 still had 0.91.
FVU_USELESS = 0.9  # little better than the mean alone
FVU_HIGH = 0.6
L0_BAND = 1.4  # times more or fewer features than stated
GAIN_BAND = 0.7  # reconstructions larger than 1 / this, or smaller than this
DEAD_HIGH, USES_EACH = 0.5, 20  # more than half dead, once there were so many uses a feature
RECOVERED_LOW = 0.8
BETTER = 0.9  # another place is the right one when its FVU is so many times this one's


def verdict(
    figures: FitFigures,
    *,
    features: int,
    stated_l0: float | None = None,
    recovered: float | None = None,
    elsewhere: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[str, ...]:
    """What the figures call wrong, one sentence each; nothing if the SAE reads this place well.

    features: F. elsewhere: name of another place in the model -> FVU there and FVU here, both over
    the same tokens. recovered: the share of the loss that the reconstruction recovers.
    """
    return tuple(
        text
        for text in (
            _elsewhere(elsewhere or {}),
            _fvu(figures),
            _l0(figures, stated_l0),
            _gain(figures),
            _dead(figures, features),
            _recovered(recovered),
        )
        if text
    )


def _elsewhere(elsewhere: Mapping[str, tuple[float, float]]) -> str:
    better = {name: pair for name, pair in elsewhere.items() if pair[0] < BETTER * pair[1]}
    if not better:
        return ""
    name, (there, here) = min(better.items(), key=lambda item: item[1][0])
    return (
        f"Wrong place: the SAE reads the {name} better (FVU {there:.3f} there, {here:.3f} here). "
        "Correct --layer and --site."
    )


def _fvu(f: FitFigures) -> str:
    if f.fvu is None or f.fvu <= FVU_HIGH:
        return ""
    if f.fvu > FVU_USELESS:
        return (
            f"FVU is {f.fvu:.3g}: the reconstruction is {'worse than' if f.fvu > 1 else 'about'} "
            "the mean of the activations. The site, the block, the scale of the inputs or the "
            "model is not the one that the SAE was trained on."
        )
    return (
        f"FVU is {f.fvu:.3f}, above {FVU_HIGH:g}: the SAE misses most of what varies here. It may "
        "be a block off, or made for another model (a base model's SAE on its chat model)."
    )


def _l0(f: FitFigures, stated: float | None) -> str:
    if stated is None or stated / L0_BAND <= f.l0 <= stated * L0_BAND:
        return ""
    return (
        f"L0 is {f.l0:.1f}, its files say {stated:g}: the inputs have another scale than in "
        "training. Look at --layer, --site and --norm-scaling-factor."
    )


def _gain(f: FitFigures) -> str:
    if f.gain is None or GAIN_BAND <= f.gain <= 1 / GAIN_BAND:
        return ""
    off = f"{1 / f.gain:.1f} times too large" if 0 < f.gain < 1 else f"off by {f.gain:.2f}"
    return (
        f"The reconstruction varies {off}: the inputs have another scale than in training, or "
        "this is another place."
    )


def _dead(f: FitFigures, features: int) -> str:
    if f.dead <= DEAD_HIGH or f.tokens * f.l0 < USES_EACH * features:
        return ""
    return (
        f"{f.dead:.0%} of the features are never active on {f.tokens} tokens: the SAE was trained "
        "on other activations, or on other text."
    )


def _recovered(recovered: float | None) -> str:
    if recovered is None or recovered >= RECOVERED_LOW:
        return ""
    return (
        f"Loss recovered is {recovered:.2f}: with the reconstruction in its place the model loses "
        "much of what it knows, so the features do not hold what matters here."
    )


def stated_l0(sae: SaeWeights) -> float | None:
    """The L0 that the SAE's own files or their path name, if any."""
    if sae.k is not None:
        return float(sae.k)
    found = re.findall(r"average_l0_(\d+)", sae.source)
    return float(found[-1]) if found else None
