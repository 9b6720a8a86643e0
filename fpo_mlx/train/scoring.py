"""Where the model, the SAEs and the objective meet: pairs in, one loss per pair out.

The trainer differentiates `losses`, evaluation calls it without gradient; the rows are those of
`model.reader`, by which the reference was scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import mlx.core as mx
import numpy as np

from fpo_mlx.config import Objective
from fpo_mlx.core import features as F
from fpo_mlx.core.logprobs import TokenValues, token_values
from fpo_mlx.core.objectives import PairLosses, Seen, preference_losses
from fpo_mlx.model import adapters
from fpo_mlx.model.policy import Layout, Policy, Rows
from fpo_mlx.model.reader import Reader
from fpo_mlx.records import NO_FACTS, PairScore, TokenPair

# What the objective calls the facts of a pair, and what they are where no row says anything.
NAMES = ("agreement", "weights", "score_gaps")
FACTS: dict[str, float] = dict(zip(NAMES, astuple(NO_FACTS), strict=True))


@dataclass(frozen=True)
class Measures:
    """What was seen of each response, [2, B] (0 chosen, 1 rejected), nats and tokens."""

    logps: mx.array
    ref_logps: mx.array
    lengths: mx.array
    agreement: mx.array  # [B] each, as the rows say
    weights: mx.array
    score_gaps: mx.array
    distances: mx.array | None = None  # D of Eq. 10, raw, mean over SAEs
    relative: mx.array | None = None  # D over the mean square of the reference's top-k
    kl: mx.array | None = None  # sequential KL(reference || policy)
    log_collisions: mx.array | None = None  # sum over tokens of log sum_v pi(v)^2


class Scorer:
    """Scores pairs with a policy against cached reference rows."""

    def __init__(
        self,
        policy: Policy,
        encoders: Sequence[F.Encoder],
        objective: Objective,
        *,
        feature_weights: Sequence[Mapping[int, float]] = (),
        measure_kl: bool = False,
    ) -> None:
        self.reader, self.objective = Reader(policy, encoders), objective
        self.policy, self.encoders = policy, self.reader.encoders
        self.half = policy.dtype != mx.float32  # log-probs carry rounding of half precision
        self.alpha = objective.judged_alpha  # of the next losses; a controller moves it
        self.largest_pull: float | None = None  # bound of alpha (D_rejected - D_chosen), per pair
        self.measure_kl = measure_kl or objective.constraint == "kl"
        self.feature_weights = tuple(feature_weights)
        self._pinned = [_pinned(weights) for weights in feature_weights]
        # the adapter weights under which the model is the reference
        self.reference: dict[str, mx.array] = dict(adapters.parameters(policy.model))

    def freeze_reference(self, weights: Mapping[str, mx.array] | None = None) -> None:
        """Take these adapter weights (default: the present ones) as the reference's, for the KL."""
        self.reference = dict(weights or adapters.parameters(self.policy.model))

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model with the reference's adapter weights in it, dropping nothing."""
        model, training = self.policy.model, self.policy.model.training
        current = dict(adapters.parameters(model))
        adapters.update(model, self.reference)
        model.eval()
        try:
            yield
        finally:
            adapters.update(model, current)
            model.train(training)

    def losses(
        self, pairs: Sequence[TokenPair], refs: Sequence[PairScore], *, grad: bool
    ) -> tuple[PairLosses, Measures]:
        """The loss of each pair, differentiable in the adapters when `grad`."""
        seen, measures = self.see(pairs, refs, grad=grad)
        return preference_losses(seen, self.objective), measures

    def see(
        self, pairs: Sequence[TokenPair], refs: Sequence[PairScore], *, grad: bool
    ) -> tuple[Seen, Measures]:
        """What the losses are made of, and what a report shows."""
        layout, rows = Layout.of(pairs), self.policy.rows(pairs)
        logps, kl, log_collisions = self._token_sums(pairs, rows, layout, grad)
        distances, relative, penalties, held = None, None, None, None
        if self.encoders:
            distances, relative, named = self._distances(rows, layout, refs, logps, grad)
            if self.objective.pooled:
                penalties = _by_side(relative if self.objective.relative else distances)
                if any(self.feature_weights):
                    held = _by_side(named)[0]
        if self.objective.constraint == "kl" and kl is not None:
            penalties = _by_side(kl)
        ref_logps = [[side.logps for side in ref] for ref in refs]  # [B, 2]
        facts = facts_of(pairs)
        measures = Measures(
            _by_side(logps),
            mx.array(np.array(ref_logps, dtype=np.float32).T),
            mx.array(layout.lengths.reshape(-1, 2).T.astype(np.float32)),
            **{name: mx.array(fact) for name, fact in facts.items()},
            distances=None if distances is None else _by_side(distances),
            relative=None if relative is None else _by_side(relative),
            kl=None if kl is None else _by_side(kl),
            log_collisions=None if log_collisions is None else _by_side(log_collisions),
        )
        own = {name: getattr(measures, name) for name in facts if _says_more(name, facts[name])}
        seen = Seen(
            measures.logps, measures.ref_logps, measures.lengths, penalties, held,
            alphas=self._alpha(penalties), log_collisions=measures.log_collisions, **own,
        )  # fmt: skip
        return seen, measures

    def _alpha(self, penalties: mx.array | None) -> float | mx.array:
        """alpha of each pair: less where its pull alone would look like a margin that exploded."""
        if penalties is None or self.largest_pull is None:
            return self.alpha
        gap = mx.abs(mx.stop_gradient(penalties[1] - penalties[0]))  # [B]
        return mx.minimum(self.alpha, self.largest_pull / mx.maximum(gap, 1e-20))

    def _token_sums(
        self, pairs: Sequence[TokenPair], rows: Rows, layout: Layout, grad: bool
    ) -> TokenValues:
        """Log-probs, KL and log collisions summed over each response: [2B], in nats."""
        policy, ref_hidden = self.policy, None
        if self.measure_kl:
            with self.as_reference():
                ref_hidden = policy.rows(pairs).hidden
        found = token_values(
            rows.hidden, layout.targets, policy.head, policy.vocab_size,
            ref_hidden=ref_hidden, collisions=self.objective.wpo, grad=grad,
        )  # fmt: skip
        sums = (None if values is None else layout.totals(values) for values in found)
        return TokenValues(*sums)  # type: ignore[arg-type]

    def _distances(
        self, rows: Rows, layout: Layout, refs: Sequence[PairScore], logps: mx.array, grad: bool
    ) -> tuple[mx.array, mx.array, mx.array]:
        """D, relative D, and the named features' part of the one that the loss takes.

        Each [2B], means over the SAEs; each SAE's D is scaled by its own activations.
        """
        results, k = [], self.objective.top_k
        for i, (encoder, tapped) in enumerate(zip(self.encoders, rows.tapped, strict=True)):
            n = encoder.n_features
            dense = [side.features[i].to_dense(n) for ref in refs for side in ref]
            pinned = self._pinned[i] if i < len(self._pinned) else None
            ref = mx.array(np.stack(dense))
            pooled, gates = F.pool(encoder, tapped, layout.means(), after=[logps])  # [2B, F]
            distance, named = self._distance(
                encoder, tapped, layout, pooled, gates, ref, pinned, grad
            )
            over = F.reference_scale(ref, k, magnitude=encoder.signed)
            own = named / over if self.objective.relative else named
            results.append((distance, distance / over, own))
        distances, relative, of_named = (
            mx.stack(list(column)).mean(axis=0) for column in zip(*results, strict=True)
        )
        return distances, relative, of_named

    def _distance(
        self,
        encoder: F.Encoder,
        tapped: mx.array,
        layout: Layout,
        pooled: mx.array,
        gates: mx.array | None,
        ref: mx.array,
        pinned: tuple[mx.array, mx.array] | None,
        grad: bool,
    ) -> tuple[mx.array, mx.array]:
        """One SAE's D, and the named features' part of it, each [2B].

        pooled, ref: [2B, F]. Gradient where the objective lets it through.
        """
        k, signed = self.objective.top_k, encoder.signed
        indices, weights, named = _selection(pooled, ref, k, signed, pinned)  # [2B, K]
        policy = mx.take_along_axis(pooled, indices, axis=-1)
        if grad and self.objective.pooled:
            every = not self.objective.stop_gradient or pinned is not None
            moving = range(0 if every else 1, len(layout.lengths), 1 if every else 2)
            policy = _with_gradient(encoder, tapped, layout, policy, gates, indices, moving)
        there = mx.take_along_axis(ref, indices, axis=-1)
        if pinned is None:
            distances = F.distance(policy, there, weights, k)
            return distances, mx.zeros_like(distances)
        of_named = F.distance(policy, there, weights * named, k)
        rest = F.distance(policy, there, weights * (1 - named), k)
        chosen = mx.arange(len(layout.lengths)) % 2 == 0  # there they pull through `held` alone
        return rest + mx.where(chosen, mx.stop_gradient(of_named), of_named), of_named


def facts_of(pairs: Sequence[TokenPair]) -> dict[str, np.ndarray]:
    """agreement, weights and score gaps of the pairs, each float32 [B]."""
    facts = [astuple(pair.facts) for pair in pairs]
    return dict(zip(FACTS, np.array(facts, np.float32).T, strict=True))


def _says_more(name: str, values: np.ndarray) -> bool:
    return bool((values != FACTS[name]).any())


def _selection(
    pooled: mx.array,
    ref: mx.array,
    k: int,
    signed: bool,
    pinned: tuple[mx.array, mx.array] | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """I of Eq. 10: indices, weights, and 1 where the user names the feature; each [2B, K]."""
    parts = [F.top_set(side, k, magnitude=signed) for side in (pooled, ref)]
    if pinned is None:
        indices, weights = F.union_indices(parts)
        return indices, weights, mx.zeros_like(weights)
    names, values = pinned
    always = mx.broadcast_to(names[None], (pooled.shape[0], len(names)))
    indices, weights = F.union_indices([*parts, (always, mx.ones(always.shape))])
    hit = (indices[..., None] == names).astype(mx.float32)  # [2B, K, P]
    named = hit.sum(axis=-1)
    return indices, weights * ((hit * values).sum(axis=-1) + 1.0 - named), named


def _with_gradient(
    encoder: F.Encoder,
    tapped: mx.array,
    layout: Layout,
    values: mx.array,
    gates: mx.array | None,
    indices: mx.array,
    moving: Sequence[int],
) -> mx.array:
    """values [2B, K], those of the responses in `moving` made anew so that gradient flows."""
    rows = list(values)
    for i in moving:
        own = layout.rows(i)
        gate = None if gates is None else gates[own]
        rows[i] = F.selected_means(encoder, tapped[own], gate, indices[i])
    return mx.stack(rows)


def _by_side(values: mx.array) -> mx.array:
    """[2B] in order c0, r0, c1, r1, … -> [2, B]."""
    return values.reshape(-1, 2).T


def _pinned(weights: Mapping[int, float]) -> tuple[mx.array, mx.array] | None:
    """Features the user names: (indices [P], weights [P])."""
    if not weights:
        return None
    indices = sorted(weights)
    return mx.array(indices), mx.array([float(weights[i]) for i in indices])
