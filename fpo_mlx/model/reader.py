"""What a model says of responses, without any objective: log-probs, pooled features, scores.

The reference pass, the feature reports and the losses all read responses through here, so they see
the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from fpo_mlx.core import features as F
from fpo_mlx.core.logprobs import token_logps
from fpo_mlx.core.parts import Parts
from fpo_mlx.machine import device
from fpo_mlx.model.policy import Layout, Policy
from fpo_mlx.records import PairScore, ResponseScore, SaeWeights, SparseFeatures, TokenPair

ENCODER_ARRAYS = ("b_enc", "b_in", "threshold", "gate_scale", "gate_bias", "act_scale")
FILLED = 1 << 22  # values of a matrix that are read at once: 16 MiB


def encoder_of(sae: SaeWeights) -> F.Encoder:
    """Arrays of the SAE's encoder on the default device, float32.

    A matrix that lies on the disk goes straight into them, block by block; one that a buffer of the
    device does not hold goes into several.
    """
    given = {name: getattr(sae, name) for name in ENCODER_ARRAYS}
    arrays: dict[str, Any] = {k: None if a is None else mx.array(a) for k, a in given.items()}
    if arrays["threshold"] is not None:  # below 0 it would be the ReLU's: the same function
        arrays["threshold"] = mx.maximum(arrays["threshold"], 0.0)
    plain = sae.activation == "identity"  # its matrix changes nothing
    return F.Encoder(
        activation=sae.activation,
        w_enc=None if plain else _matrix(sae),
        inputs=mx.arange(sae.n_features) if plain else None,
        k=sae.k or 0,
        normalize=sae.normalize,
        **arrays,
    )


def _matrix(sae: SaeWeights) -> mx.array | Parts:
    """w_enc as rows [F, D_in]; groups of features stay in one array."""
    limit, n = device.here().buffer_limit, sae.n_features
    most = n if limit is None else max(limit // (4 * sae.d_in * sae.group), 1) * sae.group
    found = [_filled(sae.w_enc, at, min(at + most, n)) for at in range(0, n, most)]
    return found[0] if len(found) == 1 else Parts(found)


def _filled(w_enc: np.ndarray, first: int, last: int) -> mx.array:
    """The features from first to last. MLX writes into the one array that it keeps."""
    rows = max(FILLED // w_enc.shape[0], 1)
    if last - first <= rows:
        return mx.array(np.ascontiguousarray(w_enc[:, first:last].T))
    filled = mx.zeros((last - first, w_enc.shape[0]))
    mx.eval(filled)
    for at in range(first, last, rows):
        own = slice(at, min(at + rows, last))
        filled[at - first : own.stop - first] = mx.array(np.ascontiguousarray(w_enc[:, own].T))
        mx.eval(filled)
    return filled


class Reader:
    """Reads the responses of pairs under a policy as it stands, and what SAEs say of them."""

    def __init__(self, policy: Policy, encoders: Sequence[F.Encoder] = ()) -> None:
        if encoders and len(encoders) != len(policy.sites):
            raise ValueError(f"{len(encoders)} encoders for {len(policy.sites)} sites")
        self.policy, self.encoders = policy, tuple(encoders)

    def scores(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        """Summed log-probs and pooled features, one vector per SAE; without gradient."""
        policy, layout = self.policy, Layout.of(pairs)
        rows, size = policy.rows(pairs), policy.vocab_size
        logps = layout.totals(
            token_logps(rows.hidden, layout.targets, policy.head, size, grad=False)
        )
        pooled = [
            F.pool(encoder, tapped, layout.means(), after=[logps])[0]
            for encoder, tapped in zip(self.encoders, rows.tapped, strict=False)
        ]
        mx.eval(logps, pooled)
        sums, dense = np.array(logps, dtype=np.float64), [np.array(p) for p in pooled]
        scores = [
            ResponseScore(
                float(sums[i]),
                int(layout.lengths[i]),
                tuple(SparseFeatures.from_dense(d[i]) for d in dense),
            )
            for i in range(len(sums))
        ]
        return list(zip(scores[0::2], scores[1::2], strict=True))

    def activations(self, pairs: Sequence[TokenPair]) -> list[np.ndarray]:
        """For each site what it holds at the response positions, float32 [R, D_in]."""
        tapped = self.policy.rows(pairs).tapped
        return [np.array(site.astype(mx.float32)) for site in tapped]
