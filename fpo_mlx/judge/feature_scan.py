"""The model's side of the feature reports: activations of pairs and texts, and where they peak."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from fpo_mlx.core import features as F
from fpo_mlx.judge.feature_report import Context, Tally, TextActivations
from fpo_mlx.judge.scaling import Scaled, Scaling
from fpo_mlx.model.policy import Policy
from fpo_mlx.records import Passage, SaeWeights, TokenPair
from fpo_mlx.train.metrics import ScoredPairs
from fpo_mlx.train.scoring import Scorer

Decode = Callable[[Sequence[int]], str]
BEFORE, AFTER = 12, 4  # tokens of a context around the one that fires
ROWS = 128  # encoded at once


def tally(scorer: Scorer, data: ScoredPairs, report: Callable[[int], None]) -> list[Tally]:
    """Every pair under the policy against the reference's cached features; one Tally an SAE."""
    k, weights = scorer.objective.top_k, scorer.feature_weights
    tallies = [
        Tally(e.n_features, k, magnitude=e.signed, weights=weights[i] if weights else {})
        for i, e in enumerate(scorer.encoders)
    ]
    for done, (pair, ref) in enumerate(zip(data.pairs, data.refs, strict=True), start=1):
        ((chosen, rejected),) = scorer.reader.scores([pair])
        for i, one in enumerate(tallies):
            n = scorer.encoders[i].n_features
            policy, before = (
                np.stack([side.features[i].to_dense(n) for side in sides])
                for sides in ((chosen, rejected), ref)
            )
            one.add(policy, before)
        report(done)
    return tallies


def pair_texts(pairs: Iterable[TokenPair]) -> Iterator[Passage]:
    """Both responses of each pair."""
    for pair in pairs:
        for side, response in zip(("chosen", "rejected"), pair.responses, strict=True):
            yield Passage(pair.prompt, response, f"pair {pair.index}, {side}")


def activations(policy: Policy, encoder: F.Encoder, site: int, text: Passage) -> np.ndarray:
    """Of every response position: [n, F] float32."""
    return encoded(encoder, policy.answer_rows(text.prompt, text.response).tapped[site])


def encoded(encoder: F.Encoder, rows: mx.array) -> np.ndarray:
    """rows: [n, D] of the site -> activations [n, F] float32."""
    parts = [F.encode(encoder, rows[i : i + ROWS]) for i in range(0, rows.shape[0], ROWS)]
    return np.array(mx.concatenate(parts))


def scaled(
    policies: tuple[Policy, Policy], encoder: F.Encoder, site: int, sae: SaeWeights,
    texts: Iterable[Passage], features: Sequence[int],
) -> list[Scaled]:  # fmt: skip
    """Latent scaling of features between two models (before, after), at the response positions."""
    sums = Scaling(sae, features)
    for text in texts:
        rows = [p.answer_rows(text.prompt, text.response).tapped[site] for p in policies]
        acts = [encoded(encoder, one) for one in rows]
        sums.add([np.array(one.astype(mx.float32)) for one in rows], acts)
    return sums.results()


def read_texts(
    policy: Policy, encoder: F.Encoder, site: int, texts: Sequence[Passage]
) -> TextActivations:
    """Strongest single-token and mean activation of every feature in every text."""
    strongest, means = [], []
    for text in texts:
        acts = activations(policy, encoder, site, text)
        strongest.append(acts.max(axis=0))
        means.append(acts.mean(axis=0))
    return TextActivations(np.stack(strongest), np.stack(means))


def contexts(
    policy: Policy,
    encoder: F.Encoder,
    site: int,
    texts: Iterator[Passage] | Sequence[Passage],
    features: Sequence[int],
    count: int,
    decode: Decode,
) -> dict[int, list[Context]]:
    """The `count` texts in which each feature fires most, one token of each, strongest first."""
    best = {feature: Strongest(count) for feature in features}
    for text in texts if best else ():
        acts = activations(policy, encoder, site, text)
        for feature, of_feature in best.items():
            of_feature.add(acts[:, feature], text)
    return {feature: of_feature.contexts(decode) for feature, of_feature in best.items()}


class Strongest:
    """The `count` texts in which one feature fires most."""

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, 0
        self._heap: list[tuple[float, int, int, Passage]] = []

    def add(self, acts: np.ndarray, text: Passage) -> None:
        """acts: the feature's at the text's response positions, [n]; their size counts."""
        size = np.abs(acts)
        at = int(size.argmax())
        self._seen += 1
        if size[at] > 0:
            heapq.heappush(self._heap, (float(size[at]), -self._seen, at, text))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    def contexts(self, decode: Decode) -> list[Context]:
        """One token of each, strongest first."""
        best = sorted(self._heap, reverse=True)
        return [context_of(value, at, text, decode) for value, _, at, text in best]


def context_of(value: float, at: int, text: Passage, decode: Decode) -> Context:
    """at: number of the response position; the token there is the one before what it predicts."""
    tokens = [*text.prompt.tolist(), *text.response.tolist()]
    place = len(text.prompt) - 1 + at
    token = decode(tokens[place : place + 1])
    before = decode(tokens[max(0, place - BEFORE) : place])
    after = decode(tokens[place + 1 : place + 1 + AFTER])
    return Context(value, token, f"{before}«{token}»{after}", text.where)
