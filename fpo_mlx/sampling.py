"""Answers sampled from a model, by mlx-lm's own loop, and how various they are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core.logprobs import log_softmax


@dataclass(frozen=True)
class Answer:
    """One sampled response. n tokens, an end of turn included."""

    prompt: np.ndarray  # int32 [P]
    tokens: np.ndarray  # int32 [n]
    entropies: np.ndarray  # float64 [n], nats, of the distribution each token was drawn from
    finished: bool  # the model ended it itself


def sample(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    settings: Sampling,
    end: Collection[int],
) -> Iterator[Answer]:
    """One answer to each prompt. prompts: token ids [P]; end: tokens that end an answer.

    The noise depends on the seed, the prompt's number and the position only, so that two models
    are sampled with the same noise, and nobody else's random state moves.
    """
    for number, prompt in enumerate(prompts):
        yield _answer(model, prompt, number, settings, end)


def _answer(
    model: nn.Module, prompt: np.ndarray, number: int, settings: Sampling, end: Collection[int]
) -> Answer:
    from mlx_lm.generate import generate_step

    temperature, positions = settings.temp, itertools.count()

    def draw(logprobs: mx.array) -> mx.array:
        if not temperature:
            return mx.argmax(logprobs, axis=-1)
        key = _key(settings.seed, number, next(positions))
        return mx.random.categorical(logprobs / temperature, key=key)

    tokens, entropies = [], []
    steps = generate_step(mx.array(prompt), model, max_tokens=settings.max_tokens, sampler=draw)
    for token, logprobs in steps:
        entropies.append(entropy(logprobs[None] / (temperature or 1.0)).item())
        tokens.append(int(token))
        if tokens[-1] in end:
            break
    return Answer(
        np.asarray(prompt, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(entropies, dtype=np.float64),
        bool(tokens) and tokens[-1] in end,
    )


def _key(*numbers: int) -> mx.array:
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return mx.random.key(int(state[0]))


def entropy(logits: mx.array) -> mx.array:
    """Entropy of each row's whole distribution, nats. [r, V] -> [r]."""
    logps = log_softmax(logits)
    return -(mx.exp(logps) * mx.maximum(logps, -1e4)).sum(axis=-1)  # 0 * -inf is no number


def distinct_n(answers: Sequence[Sequence[int] | np.ndarray], n: int) -> float | None:
    """Different n-grams over all answers, divided by the number of n-grams; None without any.

    Source: Li et al. 2016, arXiv 1510.03055 (distinct-1 and distinct-2), over all answers at once.
    """
    grams = [
        tuple(int(t) for t in answer[i : i + n])
        for answer in answers
        for i in range(len(answer) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def first_prompts(prompts: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """The first `count` different prompts."""
    unique = {prompt.tobytes(): prompt for prompt in prompts}
    return list(itertools.islice(unique.values(), count))


def records(answers: Sequence[Answer], decode: Any) -> list[dict[str, Any]]:
    """As `evaluate --json` holds them. decode: token ids -> text."""
    return [
        {
            "prompt_ids": answer.prompt.tolist(),
            "ids": answer.tokens.tolist(),
            "entropies": answer.entropies.tolist(),
            "finished": answer.finished,
            "text": decode(answer.tokens),
        }
        for answer in answers
    ]
