"""The wanted score in the system text. Source: Reward-Augmented Data, arXiv 2410.08067, section 3.

A scored pair becomes two: asked for the chosen's score the chosen answer is the better one, asked
for the rejected's score the rejected one is. At inference the highest score is asked for.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fpo_mlx.data.rows import Turns
from fpo_mlx.pairs.records import Prompt

SENTENCE = "Write an answer whose score is {score}."
_ASKED = re.compile(r"(^|\n\n)" + re.escape(SENTENCE).replace(r"\{score\}", r"\S+") + r"\Z")


def with_score(prompt: Prompt, score: float) -> Prompt:
    """The prompt with the wanted score at the end of its system text."""
    return replace(prompt, turns=score_turns(prompt.turns, score))


def score_turns(turns: Turns, score: float) -> Turns:
    """Two digits of the score: more of them are only more tokens that mean nothing."""
    rounded = float(f"{score:.2g}") + 0.0  # no -0
    sentence = SENTENCE.format(score=f"{rounded:g}")
    if turns[0]["role"] in ("system", "developer"):
        own = _ASKED.sub("", turns[0]["content"])  # answers that were made for another score
        first = dict(turns[0]) | {"content": f"{own}\n\n{sentence}" if own else sentence}
        return (first, *turns[1:])
    return ({"role": "system", "content": sentence}, *turns)
