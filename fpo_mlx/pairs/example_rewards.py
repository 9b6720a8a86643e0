"""Two example rewards, to try the way from prompts to pairs and to write your own by.

They measure the form of an answer, never whether it is right: a model tuned to them learns that
form. `--reward brevity`, `--reward plainness`, or a file of yours: `--reward my.py:function`.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_END = re.compile(r"[.!?…]+(?:\s|$)")


def brevity(prompt: str, answer: str) -> float:
    """1 for an empty answer, a half at 40 words, towards 0 as it grows; -1 for none at all."""
    del prompt
    words = len(_WORD.findall(answer))
    return 40 / (40 + words) if words else -1.0


def plainness(prompt: str, answer: str) -> float:
    """High for short words in short sentences: minus letters per word and a fifth of words per
    sentence. -20 for an answer without a word."""
    del prompt
    words = _WORD.findall(answer)
    if not words:
        return -20.0
    sentences = max(1, len(_END.findall(answer)))
    return -sum(map(len, words)) / len(words) - 0.2 * len(words) / sentences
