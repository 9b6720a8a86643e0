"""What a judge is asked, word for word, and how its answer is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError
from fpo_mlx.pairs.records import Candidates, Verdict

LETTERS = ("A", "B")
LEAST_MASS = 0.1  # of both letters together; below it the judge has said something else
AT_ONCE = {"enable_thinking": False}  # for the template of a judge that would think before it says
_NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")  # of a Qwen3 that was told not to think
END = "Reply with one letter, A or B, and nothing else."


def read_criteria(path: str | None) -> str:
    """Raises: ConfigError where the file cannot be read or is empty."""
    try:
        source = Path(path) if path else files("fpo_mlx.pairs").joinpath("criteria.txt")
        text = source.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--criteria {path}: cannot be read: {error}.") from error
    if not text:
        raise ConfigError(f"--criteria {path}: the file is empty. Say what a better answer is.")
    return text


def messages(found: Candidates, first: int, second: int, criteria: str) -> list[dict[str, str]]:
    """The question as one user turn: conversation, two answers, one letter to say."""
    said = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in found.prompt.turns)
    answers = "\n\n".join(
        f"[Answer {letter}]\n{found.candidates[n].text}\n[End of answer {letter}]"
        for letter, n in zip(LETTERS, (first, second), strict=True)
    )
    text = f"{criteria}\n\n[Conversation]\n{said}\n[End of conversation]\n\n{answers}\n\n{END}"
    return [{"role": "user", "content": text}]


def judge_name(model: str, identity: str, criteria: str) -> str:
    """The model's last name and a hash: another model of that name, or other criteria, are another.

    identity: the fingerprint of its weights, or where it is served.
    """
    parts = (identity, criteria, END)
    return f"{Path(model).name or model}@{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def verdict(
    id: str, a: int, b: int, order: str, judge: str, first: float | None, raw: str, time: float
) -> Verdict:
    """first: probability that the answer shown first is the better one; None: unreadable."""
    if first is None:
        return Verdict(id, a, b, order, "unreadable", judge, raw=raw, time=time)
    p = first if order == "ab" else 1 - first
    side = "tie" if p == 0.5 else "a" if p > 0.5 else "b"
    return Verdict(id, a, b, order, side, judge, p, raw=raw, time=time)


def first_of_masses(a: float, b: float) -> float | None:
    """From the probabilities of the two letters."""
    return a / (a + b) if a + b >= LEAST_MASS else None


def read_reply(reply: Mapping[str, Any]) -> tuple[float | None, str]:
    """(probability of the first, raw) of a chat completion: its first token's log-probs, or its one
    letter where there are none or they are of something else. An empty thought may come before.

    Raises: ValueError where it is no chat completion.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError):
        raise ValueError("no choices[0].message.content") from None
    masses = _masses(choice)
    if masses is None:
        return _letter(text), text[:200]
    first = first_of_masses(*masses)
    if first is None:  # a mark or a line end may come before the letter
        first = _letter(text)
    return first, json.dumps({"text": text[:200], "p": masses})


def _letter(text: str) -> float | None:
    """The probability of the first where a reply is one letter, whatever marks stand around it."""
    thought = _NO_THOUGHT.match(text)
    said = text[thought.end() :] if thought else text
    return {"A": 1.0, "B": 0.0}.get(said.strip().strip(".*\"'`()[] "))


def _begins(tokens: Sequence[Mapping[str, Any]]) -> int:
    """The number of the first token that is no part of an empty thought."""
    texts = [str(one.get("token") or "") for one in tokens]
    thought = _NO_THOUGHT.match("".join(texts))
    ends = itertools.accumulate(map(len, texts))
    return sum(end <= thought.end() for end in ends) if thought else 0


def _masses(choice: Mapping[str, Any]) -> tuple[float, float] | None:
    """Probabilities of A and B at the first token of what it says, where the endpoint gives any."""
    try:
        tokens = choice["logprobs"]["content"]
        top = tokens[_begins(tokens)]["top_logprobs"]
        found = {letter: 0.0 for letter in LETTERS}
        for one in top:
            if (letter := one["token"].strip()) in found:
                found[letter] += math.exp(min(0.0, float(one["logprob"])))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return (found["A"], found["B"]) if top else None
