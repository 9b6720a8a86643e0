"""Did a feature that moved really move? Latent scaling, on one SAE that reads two models.

An SAE can say that a feature grew while the stream it reads holds as much of the feature's
direction as before: before, the direction lay in what the SAE left unexplained (its choice of k, a
threshold), or other features wrote it. Minder et al. 2025 (Overcoming Sparsity Artifacts in
Crosscoders to Interpret Chat-Tuning, arXiv 2504.02922) ask this of a crosscoder's latents: the
factor beta that fits best when the latent's own contribution f d is to explain some vectors y,

    beta(y) = argmin_b sum ||y - b f d||^2 = sum f <d, y> / (||d||^2 sum f^2),

for y the other model's error (complete shrinkage) and its reconstruction (latent decoupling), each
over the same factor of the model that has the latent. Here f is the feature in the model in which
it fires more. As beta is linear in y, what the SAE says went away splits without a rest:

    1 - kept = beta(h_with - h_without) + hidden + elsewhere.

Pure numpy on the activations of single tokens; which are called real is a threshold of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights

REAL = 0.5  # of the change that the SAE claims has to be in the stream
SMALL = 0.05  # of the feature's own size: less is no change that could be told apart


@dataclass(frozen=True)
class Scaled:
    """One feature. real, hidden and elsewhere are shares of the claimed change and sum to 1.

    real: in the difference of the streams; hidden: taken from the SAE's error; elsewhere: taken
    from other features. None where the claimed change is too small to be split.
    """

    stronger: str  # "after" or "before": the model in which it fires more
    claimed: float  # 1 - kept: the part of the feature that the other model has not, says the SAE
    real: float | None
    hidden: float | None
    elsewhere: float | None
    nu_error: float | None  # the paper's ratios: near 0 the other model has nothing of it there
    nu_reconstruction: float | None
    verdict: str  # real, hidden, elsewhere, or "small"


def wanting(sae: SaeWeights) -> str:
    """What latent scaling needs and this SAE is not; "" where it fits."""
    if not sae.writes_back or sae.b_dec is None:
        return "the decoder of the SAE's own site"
    return "an SAE of raw activations" if sae.normalize != "none" or sae.centred else ""


class Scaling:
    """Sums over tokens of both models, so that memory is O(features looked at)."""

    def __init__(self, sae: SaeWeights, features: Sequence[int]) -> None:
        """Raises: SaeError for an SAE whose decoder does not write what it reads, in raw units."""
        if what := wanting(sae):
            raise SaeError(f"{sae.source}: scaling needs {what}.")
        assert sae.w_dec is not None
        assert sae.b_dec is not None
        self.features, self._w_dec = list(features), sae.w_dec
        self._rows = sae.w_dec[self.features].astype(np.float64)  # [J, D]
        self._b_dec = sae.b_dec.astype(np.float64)
        n = len(self.features)
        self.cross = np.zeros(n)
        self.squares = np.zeros((2, n))  # by the model whose activations are f: before, after
        self.along = np.zeros((2, 2, 2, n))  # f's model, y's model, y: reconstruction, error

    def add(self, hidden: Sequence[np.ndarray], acts: Sequence[np.ndarray]) -> None:
        """Tokens, the same in both models. hidden: [n, D] before, after; acts: [n, F] likewise."""
        own = [part[:, self.features].astype(np.float64) for part in acts]
        self.cross += (own[0] * own[1]).sum(axis=0)
        for i in (0, 1):
            self.squares[i] += (own[i] ** 2).sum(axis=0)
        for y in (0, 1):
            recon = (acts[y] @ self._w_dec).astype(np.float64)
            error = hidden[y] - self._b_dec - recon
            for kind, part in enumerate((recon, error)):
                projected = part @ self._rows.T  # [n, J]
                for i in (0, 1):
                    self.along[i, y, kind] += (own[i] * projected).sum(axis=0)

    def results(self) -> list[Scaled]:
        """In the order of the features."""
        return [self._one(j) for j in range(len(self.features))]

    def _one(self, j: int) -> Scaled:
        strong = int(self.squares[1, j] >= self.squares[0, j])
        name, square = ("before", "after")[strong], self.squares[strong, j]
        unit = square * float(self._rows[j] @ self._rows[j])
        if unit == 0:
            return Scaled(name, 0.0, None, None, None, None, None, "small")
        recon, error = self.along[strong, :, 0, j] / unit, self.along[strong, :, 1, j] / unit
        other = 1 - strong
        claimed = 1 - self.cross[j] / square
        hidden = error[other] - error[strong]
        elsewhere = (recon[other] - (1 - claimed)) - (recon[strong] - 1)
        real = claimed - hidden - elsewhere  # beta of the streams' difference
        ratios = _ratio(error[other], 1 + error[strong]), _ratio(recon[other], recon[strong])
        if abs(claimed) < SMALL:
            return Scaled(name, float(claimed), None, None, None, *ratios, "small")
        real, hidden, elsewhere = (float(part / claimed) for part in (real, hidden, elsewhere))
        verdict = "hidden" if hidden > elsewhere else "elsewhere"
        verdict = "real" if real >= REAL else verdict
        return Scaled(name, float(claimed), real, hidden, elsewhere, *ratios, verdict)


def _ratio(over: float, under: float) -> float | None:
    return float(over / under) if under > 1e-9 else None


def in_words(scaled: Scaled) -> str:
    """ "real 92 %", "hidden 71 %, real 20 %", "small" """
    if scaled.real is None:
        return scaled.verdict
    share: Any = {"real": scaled.real, "hidden": scaled.hidden, "elsewhere": scaled.elsewhere}
    first = f"{scaled.verdict} {share[scaled.verdict]:.0%}"
    return first if scaled.verdict == "real" else f"{first}, real {scaled.real:.0%}"
