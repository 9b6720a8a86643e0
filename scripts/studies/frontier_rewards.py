"""Rewards that are known, and the prompts of the frontier study.

Each reward is a function (prompt, answer) -> float for `pairs judge --reward`.
"""

from __future__ import annotations

import re
from typing import Any

from pairs_end_to_end import MORE, THINGS, sentiment

FORMS = (
    "Write one sentence about {}.", "What do you think of {}?", "Describe {} to a friend.",
    "Begin a short story about {}.", "Tell me something about {}.", "How does {} make you feel?",
    "Write a diary entry about {}.", "Say in two sentences what {} is like.",
)  # fmt: skip
HELD_OUT = 32  # things that no training prompt is about
ALL = THINGS + MORE
SMALL = frozenset(("a", "an", "the", "my", "in", "at", "for", "to", "of", "on", "s"))

# nothing that the rewards look at: what is lost elsewhere
UNRELATED = tuple(
    form.format(thing)
    for form in (
        "Explain in simple words: {}.", "What is {}?", "List three facts about {}.",
        "Why is {} important?",
    )
    for thing in (
        "photosynthesis", "a prime number", "the water cycle", "a verb", "gravity", "the heart",
        "an atom", "democracy", "a triangle", "electricity", "a volcano", "the moon",
    )
)  # fmt: skip
SUMS = tuple((f"What is {a} + {b}?", str(a + b)) for a in (2, 3, 5, 7, 10) for b in (1, 4, 6, 10))
FORMATS = tuple(
    (f"Name three {kind}. Write each on a line of its own that begins with a dash.", r"(?m)^- ")
    for kind in (
        "colours", "animals", "fruits", "rivers", "tools", "sports", "planets", "metals", "trees",
        "birds", "cities", "drinks", "seasons", "insects", "shapes", "games", "oceans", "flowers",
        "vegetables", "countries",
    )
)  # fmt: skip


def training_prompts() -> list[str]:
    return [form.format(thing) for thing in ALL[:-HELD_OUT] for form in FORMS]


def held_out_prompts() -> list[str]:
    """Half of the forms for each thing, the other half for the next: 128 prompts."""
    things = enumerate(ALL[-HELD_OUT:])
    return [form.format(thing) for i, thing in things for form in FORMS[i % 2 :: 2]]


def plain(prompt: str, answer: str) -> float:
    """Short words and sentences on the thing that was asked about: -1 to 1.

    The Automated Readability Index (package textstat; Smith and Senter 1967), a school grade: grade
    0 gives 1, grade 24 gives -1, and so does an answer without a word of the thing.
    """
    import textstat

    if not words_of(prompt) & set(re.findall(r"[a-z]+", answer.lower())):
        return -1.0
    grade = float(textstat.automated_readability_index(answer))
    return 1.0 - min(max(grade, 0.0), 24.0) / 12.0


def words_of(prompt: str) -> set[str]:
    """The words of the thing that a prompt of this study is about."""
    (thing,) = [t for t in ALL if any(form.format(t) == prompt for form in FORMS)]
    return set(re.findall(r"[a-z]+", thing.lower())) - SMALL


def right_sums(answers: list[str]) -> float:
    """Share of the sums that are in their answers."""
    pairs = zip(answers, SUMS, strict=True)
    return sum(want in re.findall(r"\d+", answer) for answer, (_, want) in pairs) / len(SUMS)


def right_formats(answers: list[str]) -> float:
    """Share of the lists that have three lines with a dash."""
    pairs = zip(answers, FORMATS, strict=True)
    return sum(len(re.findall(mark, answer)) == 3 for answer, (_, mark) in pairs) / len(FORMATS)


REWARDS: dict[str, Any] = {"sentiment": sentiment, "plain": plain}
