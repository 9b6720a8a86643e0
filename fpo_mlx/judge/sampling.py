"""Answers sampled from a model, by mlx-lm's own loop, and how various they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core.logprobs import log_softmax
from fpo_mlx.machine.upstream import leaning_on

BATCH = 16  # prompts at once: the caches of as many answers are in memory

Draw = Callable[[mx.array], mx.array]  # log-probs [1, V] -> token [1]


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
    """One answer to each prompt, in order. prompts: token ids [P]; end: tokens that end an answer.

    The noise depends on the seed, the prompt's number and the position only, so that two models
    are sampled with the same noise, and nobody else's random state moves. BATCH prompts go through
    the model at once where its caches can be put together.
    """
    size = BATCH if _batches(model) else 1
    for start in range(0, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        draws = [_drawing(settings, number) for number in numbers]
        group = [prompts[number] for number in numbers]
        together = _together if size > 1 else _alone
        yield from together(model, group, draws, settings, end)


def _batches(model: nn.Module) -> bool:
    from mlx_lm.models.cache import make_prompt_cache

    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def _drawing(settings: Sampling, number: int) -> Draw:
    """A sampler of its own, [1, V] -> [1], that counts its positions."""
    positions = itertools.count()

    def draw(logprobs: mx.array) -> mx.array:
        key = _key(settings.seed, number, next(positions))
        return mx.random.categorical(logprobs / settings.temp, key=key)

    return draw if settings.temp else _greedy


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _together(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    draws: Sequence[Draw],
    settings: Sampling,
    end: Collection[int],
) -> list[Answer]:
    """By mlx-lm's batches: a step reads the weights once for all prompts."""
    with leaning_on("mlx-lm", "`BatchGenerator`, which answers several prompts at once"):
        from mlx_lm.generate import BatchGenerator

        batch = BatchGenerator(
            model, max_tokens=settings.max_tokens, stop_tokens=[[token] for token in end],
            completion_batch_size=len(prompts), prefill_batch_size=len(prompts),
        )  # fmt: skip
        numbers = batch.insert([prompt.tolist() for prompt in prompts], samplers=list(draws))
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    entropies: dict[int, list[float]] = {number: [] for number in numbers}
    try:
        while step := batch.next_generated():
            logprobs = mx.stack([one.logprobs for one in step])  # [b, V]
            values = np.array(entropy(logprobs / (settings.temp or 1.0)))
            for one, value in zip(step, values, strict=True):
                tokens[one.uid].append(int(one.token))
                entropies[one.uid].append(float(value))
    finally:
        batch.close()
    return [
        _answer(prompt, tokens[number], entropies[number], end)
        for prompt, number in zip(prompts, numbers, strict=True)
    ]


def _alone(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    draws: Sequence[Draw],
    settings: Sampling,
    end: Collection[int],
) -> Iterator[Answer]:
    """One after the other, by mlx-lm's plain loop."""
    from mlx_lm.generate import generate_step

    for prompt, draw in zip(prompts, draws, strict=True):
        tokens, entropies = [], []
        steps = generate_step(mx.array(prompt), model, max_tokens=settings.max_tokens, sampler=draw)
        for token, logprobs in steps:
            entropies.append(entropy(logprobs[None] / (settings.temp or 1.0)).item())
            tokens.append(int(token))
            if tokens[-1] in end:
                break
        yield _answer(prompt, tokens, entropies, end)


def _answer(
    prompt: np.ndarray, tokens: list[int], entropies: list[float], end: Collection[int]
) -> Answer:
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
