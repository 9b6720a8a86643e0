"""Answers sampled from a model, and how various they are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import Sampling
from fpo_mlx.core.logprobs import log_softmax, pick
from fpo_mlx.judge import slots
from fpo_mlx.judge.slots import Answer, Asked, entropy
from fpo_mlx.machine.upstream import leaning_on

WINDOW = 64  # prompts whose answers are kept until they can be given in order


def sample(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    settings: Sampling,
    end: Collection[int],
) -> Iterator[Answer]:
    """One answer to each prompt, in order. prompts: token ids [P]; end: tokens that end an answer.

    The noise depends on the seed, the prompt's number and the position only, so that two models
    are sampled with the same noise, and nobody else's random state moves.
    """
    for start in range(0, len(prompts), WINDOW):
        numbers = range(start, min(start + WINDOW, len(prompts)))
        asked = [Asked(prompts[number], [(settings.seed, number)]) for number in numbers]
        drawn = sample_all(model, asked, settings, end, True, min(slots.ROWS, len(asked)))
        found = {i: answer for i, _, answer in drawn}
        yield from (found[i] for i in range(len(asked)))


def sample_all(
    model: nn.Module,
    asked: Sequence[Asked],
    settings: Sampling,
    end: Collection[int],
    entropies: bool = False,
    rows: int = slots.ROWS,
) -> Iterator[tuple[int, int, Answer]]:
    """Every answer that is asked for, as (prompt's number, answer's number, answer).

    Many at once where the model keeps plain keys and values, else one after the other.
    """
    if slots.row_axes(model):
        yield from slots.answers(model, asked, settings, end, rows=rows, entropies=entropies)
        return
    for i in slots.work_order(asked):
        for j, noise in enumerate(asked[i].noises):
            yield i, j, _alone(model, asked[i].prompt, noise, settings, end)


def _alone(
    model: nn.Module,
    prompt: np.ndarray,
    noise: Sequence[int],
    settings: Sampling,
    end: Collection[int],
) -> Answer:
    """By mlx-lm's plain loop, for caches of any kind."""
    with leaning_on("mlx-lm", "`generate_step`, which answers one prompt"):
        from mlx_lm.generate import generate_step

    key, positions = slots.noise_key(noise)[None], itertools.count()

    def sampler(logprobs: mx.array) -> mx.array:
        keys = slots.position_keys(key, np.array([next(positions)]))
        return slots.draw(logprobs, keys, settings.temp)

    tokens, entropies, logp = [], [], 0.0
    steps = generate_step(mx.array(prompt), model, max_tokens=settings.max_tokens, sampler=sampler)
    for token, logprobs in steps:
        tokens.append(int(token))
        entropies.append(entropy(logprobs[None] / (settings.temp or 1.0)).item())
        logp += cast(float, pick(log_softmax(logprobs[None]), mx.array([tokens[-1]])).item())
        if tokens[-1] in end:
            break
    return Answer(
        np.asarray(prompt, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(entropies, dtype=np.float64),
        bool(tokens) and tokens[-1] in end,
        logp,
    )


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
