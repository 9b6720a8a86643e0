"""Memory and time of answers to prompts and of a judge's verdicts, from shapes alone.

A step gives one token to each row. It reads every weight once, and each row then costs its FLOPs
and its passes over the vocabulary; with few rows the first decides, with many the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpo_mlx.machine.memory import FLOAT, FORWARD, FORWARD_SCORES, ModelShape, Term, seconds

VOCABULARY_ARRAYS = 6  # [rows, V] in float32: logits, log-probs, noise and what it is made of
# Fitted to measured times (docs/measurements.md): seconds per logit of a row that is drawn from
DRAW_ON_CPU = 45e-9


@dataclass(frozen=True)
class Speed:
    """What was measured of this machine. gflops: of a large product; bandwidth: bytes per second
    at which weights are read."""

    gflops: float
    bandwidth: float
    cpu: bool


@dataclass(frozen=True)
class Batch:
    """Rows that run together: answers, the columns of their caches, tokens of each prompt."""

    answers: int
    columns: int
    prompts: tuple[int, ...]


def answer_terms(model: ModelShape, batches: Sequence[Batch], rows: int) -> list[Term]:
    """Peak bytes while prompts are answered."""
    columns = max(batch.columns for batch in batches)
    longest = max(length for batch in batches for length in batch.prompts)
    return [
        Term("weights", model.weights),
        Term("keys and values", rows * columns * _per_token(model)),
        Term("vocabulary", VOCABULARY_ARRAYS * FLOAT * rows * model.vocab),
        Term("a prompt in work", longest * _per_token(model) + _work(model, longest)),
    ]


def answer_seconds(
    model: ModelShape, batches: Sequence[Batch], rows: int, max_tokens: int, speed: Speed
) -> float:
    """Until all prompts are answered, if every answer were as long as it may be."""
    whole = 0.0
    for batch in batches:
        steps = -(-batch.answers // rows) * max_tokens
        whole += steps * step_seconds(model, rows, batch.columns, speed)
        whole += sum(prompt_seconds(model, length, speed) for length in batch.prompts)
    return whole


def step_seconds(model: ModelShape, rows: int, columns: int, speed: Speed) -> float:
    """One token of every row."""
    attention = 4.0 * model.query * columns * model.blocks
    head = 2.0 * model.hidden * model.vocab
    work = rows * (2.0 * model.block_parameters * model.blocks + attention + head)
    draw = rows * model.vocab * DRAW_ON_CPU if speed.cpu else 0.0
    return model.weights / speed.bandwidth + seconds(work, speed.gflops) + draw


def prompt_seconds(model: ModelShape, length: int, speed: Speed) -> float:
    """One pass over a prompt (or a judge's question), the head on its last token only."""
    work = 2.0 * model.block_parameters * model.blocks * length
    work += 4.0 * model.query * length * length * model.blocks
    return model.weights / speed.bandwidth + seconds(work, speed.gflops)


def judge_terms(model: ModelShape, longest: int) -> list[Term]:
    """Peak bytes while a question of `longest` tokens is judged."""
    return [
        Term("weights", model.weights),
        Term("keys and values", longest * _per_token(model)),
        Term("a question in work", _work(model, longest)),
    ]


def _per_token(model: ModelShape) -> float:
    return model.blocks * model.keys * model.value_bytes


def _work(model: ModelShape, length: int) -> float:
    """Of one block; long prompts run in pieces (`judge.slots`)."""
    piece = min(length, 1024)
    width = FORWARD["hidden"] * model.hidden + FORWARD["inner"] * model.inner
    scores = 0.0 if model.fused_attention else FORWARD_SCORES * model.heads * piece * length
    return model.value_bytes * (width * piece + scores)
