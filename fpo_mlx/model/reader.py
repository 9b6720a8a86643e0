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
from fpo_mlx.model.policy import Layout, Policy, Rows
from fpo_mlx.records import PairScore, ResponseScore, SaeWeights, SparseFeatures, TokenPair

ENCODER_ARRAYS = ("b_enc", "b_in", "threshold", "gate_scale", "gate_bias", "act_scale")


def encoder_of(sae: SaeWeights) -> F.Encoder:
    """Arrays of the SAE's encoder on the default device, float32."""
    given = {name: getattr(sae, name) for name in ENCODER_ARRAYS}
    arrays: dict[str, Any] = {k: None if a is None else mx.array(a) for k, a in given.items()}
    if arrays["threshold"] is not None:  # below 0 it would be the ReLU's: the same function
        arrays["threshold"] = mx.maximum(arrays["threshold"], 0.0)
    return F.Encoder(
        activation=sae.activation,
        w_enc=mx.array(np.ascontiguousarray(sae.w_enc.T)),
        k=sae.k or 0,
        normalize=sae.normalize,
        **arrays,
    )


class Reader:
    """Reads the responses of pairs under a policy as it stands, and what SAEs say of them."""

    def __init__(self, policy: Policy, encoders: Sequence[F.Encoder] = ()) -> None:
        if encoders and len(encoders) != len(policy.sites):
            raise ValueError(f"{len(encoders)} encoders for {len(policy.sites)} sites")
        self.policy, self.encoders = policy, tuple(encoders)

    def logps(self, rows: Rows, layout: Layout, *, grad: bool) -> mx.array:
        """Summed log-prob of each response, nats: [2B]."""
        policy = self.policy
        tokens = token_logps(rows.hidden, layout.targets, policy.head, policy.vocab_size, grad=grad)
        return layout.sums() @ tokens

    def scores(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        """Summed log-probs and pooled features, one vector per SAE; without gradient."""
        layout, rows = Layout.of(pairs), self.policy.rows(pairs)
        logps = self.logps(rows, layout, grad=False)
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
