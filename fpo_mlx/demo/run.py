"""`fpo-mlx demo`: the whole path on a small real model, with nothing but the package registry.

SmolLM2-135M-Instruct, an SAE for it and preference pairs come with the package or from PyPI.
The pairs prefer short, direct answers over padded ones.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpo_mlx import pipeline
from fpo_mlx.config import load_config
from fpo_mlx.demo import smollm2
from fpo_mlx.errors import FpoError
from fpo_mlx.storage import files, outputs

HERE = Path(__file__).parent
DATA, SAE = HERE / "data", HERE / "sae"
TRAIN_PAIRS = 120  # of the 226, so that the demo ends within minutes on two cores
SETTINGS = {
    "batch_size": 1,
    "epochs": 1.0,
    "learning_rate": 5e-5,
    "feature_scale": "raw",  # measured: "reference" collapses at this learning rate
    "steps_per_report": 10,
    "steps_per_eval": 10_000,
    "val_batches": 1,
    "save_every": 10_000,
}
MADE = outputs.Made(
    "an older demo", r"(data|reference|adapters|fused)/|[\w.-]+\.(json|html)", mark="data/"
)
QUESTIONS = ("Why do cats purr?", "What is photosynthesis?")
ANSWER_TOKENS = 120


@dataclass(frozen=True)
class Sample:
    question: str
    base: str
    tuned: str


@dataclass(frozen=True)
class DemoReport:
    """What the demo did; figures on the held-out pairs."""

    first_loss: float
    policy_accuracy_before: float  # share of pairs whose chosen answer is the likelier one
    summary: dict[str, Any]  # of `evaluate`
    samples: tuple[Sample, ...]
    adapters: Path
    fused: Path
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    *,
    workdir: Path,
    say: Callable[[str], None],
    show: Callable[[Any], None] = lambda _: None,
    train_pairs: int = TRAIN_PAIRS,
    overwrite: bool = False,
) -> DemoReport:
    """Fetch, precompute, train, evaluate, fuse, and answer two questions before and after.

    Raises: ConfigError for a folder with other things in it, or an older demo without `overwrite`;
    FpoError when a part cannot be had or the first loss is not ln 2.
    """
    outputs.claim_folder(workdir, "--output", MADE, overwrite=overwrite)
    clock = _Clock(say)
    with clock("model"):
        folders = smollm2.fetch(say=say)
    model, adapters, fused = folders.full, workdir / "adapters", workdir / "fused"
    data = _write_data(workdir / "data", train_pairs)
    config = load_config(
        SETTINGS
        | {"model": str(model), "sae": (str(SAE),), "data": str(data)}
        | {"adapter_path": str(adapters), "reference": str(workdir / "reference")}
        | {"overwrite": overwrite}
    )
    with clock("precompute"):
        pipeline.precompute(config, output=workdir / "reference", say=say)
    with clock("train"):
        first = None
        for report in pipeline.train(config, say=say):
            show(report)
            loss = getattr(report, "loss", None)
            if first is None and loss is not None:
                first = loss  # the validation before the first update: policy = reference
    with clock("evaluate"):
        result = pipeline.evaluate(config, adapter_path=str(adapters), split="valid", say=say)
    with clock("fuse"):
        pipeline.fuse(
            config, adapter_path=str(adapters), save_path=fused, dequantize=False, dtype=None,
            gguf_path=None, upload_repo=None, verify=None, overwrite=overwrite, say=say,
        )  # fmt: skip
    with clock("answers"):
        answers = [answer(folder, QUESTIONS) for folder in (model, fused)]
    if first is None:
        raise FpoError("demo: training reported no loss. Run it again in an empty --output.")
    samples = tuple(Sample(*row) for row in zip(QUESTIONS, *answers, strict=True))
    before = _policy_accuracy_before(result.pairs)
    return DemoReport(
        first, before, dict(result.summary), samples, adapters, fused, dict(clock.seconds)
    )


def _write_data(folder: Path, train_pairs: int) -> Path:
    """The first pairs of the training set and all held-out ones, where a user can look at them."""
    with open(DATA / "train.jsonl", encoding="utf-8") as lines:
        files.write_text(folder / "train.jsonl", "".join(itertools.islice(lines, train_pairs)))
    shutil.copy(DATA / "valid.jsonl", folder / "valid.jsonl")
    return folder


def _policy_accuracy_before(pairs: Sequence[Any]) -> float:
    """From the reference's own log-probs: the base prefers the likelier answer, per token."""
    chosen, rejected = (
        [pair[side]["ref_logp"] / pair[side]["tokens"] for pair in pairs]
        for side in ("chosen", "rejected")
    )
    return sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs)


def answer(folder: Path, questions: Sequence[str], max_tokens: int = ANSWER_TOKENS) -> list[str]:
    """Greedy answers through plain mlx-lm, as any user of the folder gets them."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))[:2]
    texts = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        texts.append(generate(model, tokenizer, prompt=prompt, max_tokens=max_tokens).strip())
    return texts


class _Clock:
    """Says each part's name and keeps its seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    def __call__(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._say(f"--- {self._name}")
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self._name] = time.perf_counter() - self._start
