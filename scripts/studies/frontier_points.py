"""One point of the frontier study: a model measured by what it answers.

Reward of sampled answers to held-out prompts; the KL from the base on those very answers; and what
was changed elsewhere: answers to unrelated prompts, features on them, sums, formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frontier_rewards as known
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.judge import sampling
from fpo_mlx.judge.slots import Answer, Asked
from fpo_mlx.model import adapters
from fpo_mlx.pipeline.tapped import TappedModel, open_tapped
from fpo_mlx.records import PairScore, ResponseScore, SaeWeights, TokenPair

EACH = 2  # answers to a prompt: a pair, so that the base reads the prompt once
TOKENS, GREEDY_TOKENS = 32, 24
GREEDY = Sampling(max_tokens=GREEDY_TOKENS, temp=0.0)
TOP = 50  # features that the drift is measured on
AT_ONCE = 8  # pairs scored
SEED = 20  # of the answers' noise: the same for every model


@dataclass(frozen=True)
class Base:
    """The base, measured once: what every point is compared with."""

    unrelated: list[TokenPair]  # its greedy answer and a sampled one
    scores: list[PairScore]


class Meter:
    """Measures adapters on one loaded model; `point` may be called again and again."""

    def __init__(self, model: Path, sae: SaeWeights, reward: str) -> None:
        self.tapped: TappedModel = open_tapped(model, [sae])
        self.reward = known.REWARDS[reward]
        self.width = len(sae.b_enc)
        self.model = self.tapped.reader.policy.model
        self.held_out, self.unrelated = known.held_out_prompts(), list(known.UNRELATED)
        self._attached = False
        self.base = self._base()

    def _base(self) -> Base:
        greedy = self._greedy(self.unrelated)
        drawn = list(
            sampling.sample(self.model, self._tokens(self.unrelated), _drawn(SEED), self._ends())
        )
        pairs = [
            TokenPair(a.prompt, a.tokens, b.tokens, index=i, where=str(i))
            for i, (a, b) in enumerate(zip(greedy, drawn, strict=True))
        ]
        return Base(pairs, self._scores(pairs))

    def point(self, folder: Path | None, scale: float = 1.0) -> dict[str, Any]:
        """folder: of the adapter; None measures the base. scale: part of its change."""
        if folder is not None:
            if not self._attached:
                adapters.load(self.model, folder, scale=scale)
                self._attached = True
            else:
                adapters.fill(self.model, folder, scale=scale)
        answers = self._sampled()
        elsewhere = self._elsewhere()
        if folder is not None:
            adapters.fill(self.model, folder, scale=0.0)  # the base itself
        return self._of_answers(answers) | elsewhere

    def _of_answers(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """With the base in the model. Estimates of the KL: log-prob here less the base's."""
        pairs = [
            TokenPair(one[0].prompt, one[0].tokens, one[1].tokens, index=i, where=str(i))
            for i, one in enumerate(answers)
        ]
        ref = np.array([[side.logps for side in score] for score in self._scores(pairs)])
        logp = np.array([[answer.logp for answer in one] for one in answers])
        lengths = np.array([[len(answer.tokens) for answer in one] for one in answers])
        texts = [[self._text(answer) for answer in one] for one in answers]
        reward = np.array(
            [
                [self.reward(prompt, text) for text in one]
                for prompt, one in zip(self.held_out, texts, strict=True)
            ]
        )
        return {
            "reward": reward.mean(), "reward/of_prompts": _short(reward.mean(axis=1)),
            "kl": (logp - ref).mean(), "kl/of_prompts": _short((logp - ref).mean(axis=1)),
            "base_nats_per_token": float(-ref.sum() / lengths.sum()),
            "tokens": lengths.mean(),
            "distinct_2": sampling.distinct_n([a.tokens for one in answers for a in one], 2),
            "examples": [one[0] for one in texts[:: len(texts) // 4]],
        }  # fmt: skip

    def _elsewhere(self) -> dict[str, Any]:
        """Of prompts that no reward is about."""
        greedy, before = self._greedy(self.unrelated), [p.chosen for p in self.base.unrelated]
        same = [_same(a.tokens, b) for a, b in zip(greedy, before, strict=True)]
        d = [
            [_relative_d(now, ref, self.width) for now, ref in zip(pair, base, strict=True)]
            for pair, base in zip(self._scores(self.base.unrelated), self.base.scores, strict=True)
        ]  # of each prompt's two answers
        return {
            "unrelated_drift": float(np.sqrt(np.mean(d))),
            "unrelated_drift/of_prompts": _short(np.sqrt(np.mean(d, axis=1))),
            "greedy_agreement": float(np.mean(same)),
            "greedy_agreement/of_prompts": _short(np.array(same)),
            "greedy_identical": float(np.mean([s == 1.0 for s in same])),
            "sums": known.right_sums(self._answers([q for q, _ in known.SUMS])),
            "formats": known.right_formats(self._answers([q for q, _ in known.FORMATS])),
        }

    def _sampled(self) -> list[list[Answer]]:
        noises = [[(SEED, i, j) for j in range(EACH)] for i in range(len(self.held_out))]
        asked = [Asked(p, n) for p, n in zip(self._tokens(self.held_out), noises, strict=True)]
        drawn = sampling.sample_all(self.model, asked, _drawn(SEED), self._ends())
        found = {(i, j): answer for i, j, answer in drawn}
        return [[found[i, j] for j in range(EACH)] for i in range(len(asked))]

    def _greedy(self, prompts: Sequence[str]) -> list[Answer]:
        return list(sampling.sample(self.model, self._tokens(prompts), GREEDY, self._ends()))

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        return [self._text(answer) for answer in self._greedy(prompts)]

    def _scores(self, pairs: Sequence[TokenPair]) -> list[PairScore]:
        few = (pairs[at : at + AT_ONCE] for at in range(0, len(pairs), AT_ONCE))
        return [score for some in few for score in self.tapped.reader.scores(some)]

    def _tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        ask = self.tapped.tokenizer.prompt_tokens
        return [np.array(ask([{"role": "user", "content": p}]), dtype=np.int32) for p in prompts]

    def _text(self, answer: Answer) -> str:
        ends = self._ends()
        return self.tapped.tokenizer.decode([t for t in answer.tokens.tolist() if t not in ends])

    def _ends(self) -> frozenset[int]:
        return frozenset(self.tapped.tokenizer.eos_token_ids)


def _drawn(seed: int) -> Sampling:
    return Sampling(max_tokens=TOKENS, temp=1.0, seed=seed)


def _same(now: np.ndarray, before: np.ndarray) -> float:
    """Share of the base's answer until the first other token."""
    size = min(len(now), len(before))
    other = np.flatnonzero(now[:size] != before[:size])
    return (int(other[0]) if len(other) else size) / max(len(now), len(before))


def _relative_d(now: ResponseScore, ref: ResponseScore, width: int) -> float:
    """Mean square change of the base's TOP features, over their mean square."""
    a, b = (side.features[0].to_dense(width).astype(np.float64) for side in (now, ref))
    top = np.argsort(-b)[:TOP]
    return float(((a[top] - b[top]) ** 2).mean() / (b[top] ** 2).mean())


def _short(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]
