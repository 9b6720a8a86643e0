"""What `pairs generate` and `pairs judge` will cost, before a weight is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.machine import answering
from fpo_mlx.machine.answering import Batch, Speed
from fpo_mlx.machine.memory import ModelShape, Term, total
from fpo_mlx.pairs import prompts as asking
from fpo_mlx.pairs import question
from fpo_mlx.pairs.labels import combined
from fpo_mlx.pairs.settings import GenerateConfig
from fpo_mlx.pipeline.job import Say, memory_of
from fpo_mlx.pipeline.pairs_generate import WINDOW, need_inputs, prompt_lengths
from fpo_mlx.storage.headers import outlined
from fpo_mlx.storage.hub import read_config

MATRIX = 4096  # of the product with one row that reads it once: 64 MiB


@dataclass(frozen=True)
class Cost:
    """terms: peak memory in bytes; seconds: of the whole command."""

    terms: tuple[Term, ...]
    fits: bool
    seconds: float

    @property
    def peak(self) -> float:
        return total(self.terms)

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_bytes": round(self.peak), "fits": self.fits, "seconds": self.seconds,
            "terms": {term.name: round(term.bytes) for term in self.terms},
        }  # fmt: skip


@dataclass(frozen=True)
class PairsPlan:
    """questions: what a judge is asked, both orders; question_tokens: of the longest."""

    memory: float
    prompts: int
    answers: int
    questions: int
    question_tokens: int
    generate: Cost
    judge: Cost | None

    def as_dict(self) -> dict[str, Any]:
        costs = {"generate": self.generate.as_dict(), "judge": self.judge and self.judge.as_dict()}
        return {**asdict(self), **costs}


def pairs_plan(
    settings: GenerateConfig, *, judge: str | None = None, neighbours: bool = False,
    criteria: str | None = None, memory_gb: float | None = None, say: Say,
) -> PairsPlan:  # fmt: skip
    """Predict memory and time of `pairs generate` and, with a judge model, of `pairs judge`.

    Every answer is taken to be as long as it may be. memory_gb: what may be used; default: what
    this machine lets MLX use.
    Raises: ConfigError, DataError, ModelError.
    """

    memory = memory_of(memory_gb)
    name, prompts = need_inputs(settings)
    asking.check_prompts(prompts)  # before anything is fetched
    with outlined(name, say) as path:
        lengths = prompt_lengths(settings, path, say)
        model, speed = _shape(path, settings.trust_remote_code), measure()
    batches = _batches(lengths, settings)
    made = answering.answer_terms(model, batches, settings.rows)
    seconds = answering.answer_seconds(model, batches, settings.rows, settings.max_tokens, speed)
    questions = 2 * len(combined(range(settings.n), neighbours=neighbours)) * len(lengths)
    longest = max(lengths) + 2 * settings.max_tokens + _frame(criteria)
    cost = None
    if judge:
        shape = model if judge == name else _shape_of(judge, settings.trust_remote_code, say)
        mean = sum(lengths) // len(lengths) + longest - max(lengths)
        terms = answering.judge_terms(shape, longest)
        cost = Cost(
            tuple(terms), total(terms) <= memory,
            questions * answering.prompt_seconds(shape, mean, speed),
        )  # fmt: skip
    return PairsPlan(
        memory, len(lengths), settings.n * len(lengths), questions, longest,
        Cost(tuple(made), total(made) <= memory, seconds), cost,
    )  # fmt: skip


def _batches(lengths: Sequence[int], settings: GenerateConfig) -> list[Batch]:
    """As `pairs generate` will run them."""
    import numpy as np

    from fpo_mlx.judge import slots

    found = []
    for start in range(0, len(lengths), WINDOW):
        window = lengths[start : start + WINDOW]
        asked = [slots.Asked(np.zeros(n, np.int32), [()] * settings.n) for n in window]
        for columns, members in slots.column_groups(asked, settings.max_tokens, settings.rows):
            prompts = tuple(window[i] for i in members)
            found.append(Batch(settings.n * len(prompts), columns, prompts))
    return found


def _frame(criteria: str | None) -> int:
    """Tokens of what stands around the answers in a judge's question, by a rule of thumb."""
    return 60 + len(question.read_criteria(criteria)) // 4


def _shape_of(model: str, trust_remote_code: bool, say: Say) -> ModelShape:
    with outlined(model, say) as path:
        return _shape(path, trust_remote_code)


def _shape(path: Path, trust_remote_code: bool) -> ModelShape:
    from fpo_mlx.model.load import read_model
    from fpo_mlx.pipeline.plan import shape_of

    model = read_model(path, trust_remote_code=trust_remote_code).model
    return shape_of(model, read_config(path), share_prompt=True)


def measure() -> Speed:
    """This machine's speed: a large product, and one row that reads a large matrix."""
    import mlx.core as mx

    from fpo_mlx.pipeline import doctor

    matrix, row = mx.zeros((MATRIX, MATRIX)), mx.zeros((1, MATRIX))
    mx.eval(row @ matrix.T)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(row @ matrix.T)
        best = min(best, time.perf_counter() - start)
    cpu = mx.default_device() == mx.cpu
    return Speed(doctor.gflops(), 4 * MATRIX * MATRIX / best, cpu)
