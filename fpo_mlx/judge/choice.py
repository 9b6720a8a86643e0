"""How a model chooses between two letters: their probabilities at the place of its answer."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.core.logprobs import log_softmax
from fpo_mlx.judge.slots import prefill
from fpo_mlx.model.policy import plain_caches
from fpo_mlx.model.taps import PrefixCache


def letter_masses(
    model: nn.Module, prompt: np.ndarray, letters: Sequence[Sequence[int]]
) -> list[float]:
    """Probability that the next token is one of each letter's tokens.

    prompt: int32 [P]; letters: token ids that spell each letter. Returns one number a letter.
    """
    logps = np.array(log_softmax(_last_logits(model, prompt))[0])  # [V]
    return [float(np.exp(logps[list(ids)]).sum()) for ids in letters]


def _last_logits(model: nn.Module, prompt: np.ndarray) -> mx.array:
    """[1, V] behind the prompt; the head runs on one row only where caches allow it."""
    if not plain_caches(model):
        return model(mx.array(prompt[None]))[:, -1]
    caches = [PrefixCache(part) for part in prefill(model, prompt)]
    return model(mx.array(prompt[None, -1:]), cache=caches)[:, -1]
