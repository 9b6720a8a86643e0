"""Tiny models down the GPU's branches on a CPU: in few bits, half precision, larger tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import K, open_trainer, random_pairs
from mlx_lm import utils
from tiny_models import MAKERS

from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.machine import device
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.model import adapters
from fpo_mlx.model.trees import arrays_of, cast_floats
from fpo_mlx.train import guard
from fpo_mlx.train.gradients import GRADIENTS, Ground
from fpo_mlx.train.trainer import Trainer

SIZES = [(9, 5, 8), (4, 7, 3), (6, 12, 9), (3, 6, 16)]
HALF = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
# Routers are packed in groups of 64; on a CPU experts that no packing fits would be float32 only.
WIDE = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
}
# A GPU's record, with so few logits at once that there are several chunks and tiles.
RECORD = replace(device.gpu("metal", 8e9), row_elements=8 * 300, wide_elements=100 * 32, bucket=4)


@dataclass(frozen=True)
class Case:
    maker: str = "llama"
    weights: str = "affine"  # 4-bit affine, mxfp4, or plain
    dtype: str = "bfloat16"
    kind: str = "lora"
    micro: int = 1
    preset: str = "fpo"
    checkpoint: bool = False

    def __str__(self) -> str:
        parts = [self.maker, self.weights, self.dtype, self.kind, f"micro{self.micro}", self.preset]
        return "-".join([*parts, *(["checkpoint"] if self.checkpoint else [])])


# Every kind of model, of weights, dtype and adapter, micro batch 1 and 2, checkpointing.
CASES = [
    Case(),
    Case(weights="mxfp4", kind="dora", micro=2),
    Case(dtype="float16", micro=2, preset="tdpo2"),
    Case(weights="plain", preset="dpo", kind="dora"),
    Case("gemma2", checkpoint=True),
    Case("gemma2", dtype="float16", weights="mxfp4", micro=2),
    Case("qwen3_moe", dtype="float16", preset="simpo"),
    Case("gpt_oss", weights="mxfp4", kind="dora"),
    Case("llama", "plain", "float32", micro=2),
]


# Everything with everything; the presets of a case share its trainer. MLX's CPU build multiplies
# experts that are not packed in float32 only, so they are left out in bfloat16.
FULL = [
    Case(maker, weights, dtype, kind, micro)
    for maker in ("llama", "gemma2", "qwen3_moe", "gpt_oss")
    for weights, dtype in (
        ("plain", "float32"), ("plain", "bfloat16"), ("affine", "bfloat16"), ("affine", "float16"),
        ("mxfp4", "bfloat16"),
    )
    for kind in ("lora", "dora")
    for micro in (1, 2)
    if not (maker in WIDE and (weights, dtype) == ("plain", "bfloat16"))
]  # fmt: skip


def model_folder(root: Path, case: Case) -> Path:
    """The case's model as `mlx_lm.convert` would leave it; made once."""
    target = root / f"{case.maker}-{case.weights}-{case.dtype}"
    if target.exists():
        return target
    made = MAKERS[case.maker](root / f"{target.name}-plain", **WIDE.get(case.maker, {}))
    model, config = utils.load_model(made)
    cast_floats(model, HALF[case.dtype])
    if case.weights != "plain":
        mode = case.weights
        model, config = utils.quantize_model(model, config, group_size=32, bits=4, mode=mode)
    target.mkdir()
    utils.save_model(target, model)
    utils.save_config(config, target / "config.json")
    return target


def open_case(root: Path, case: Case, **settings) -> Trainer:
    """Its trainer, under whatever record is in force."""
    return open_trainer(
        model_folder(root, case), root / f"run-{case}", random_pairs(SIZES), preset=case.preset,
        keys=("self_attn.q_proj", "self_attn.v_proj"), fine_tune_type=case.kind, start=False,
        micro_batch_size=case.micro, grad_checkpoint=case.checkpoint,
        **{"batch_size": len(SIZES), **settings},
    )  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What was seen before any update, worst of all pairs."""

    gap: float  # |u| / beta, nats per token, without gradient
    apart: float  # of a log-prob, nats per token
    distance: float  # D of either response, relative to the reference's features; 0 without an SAE
    loss: float  # first *training* loss
    want: float  # its closed form
    trained_gap: float  # |u| / beta of the pass with gradient

    def holds(self, dtype: str) -> bool:
        bound, off = (1e-5, 1e-4) if dtype == "float32" else (2e-3, 1e-3)
        return max(self.gap, self.trained_gap) <= bound and abs(self.loss - self.want) <= off


def start_of(trainer: Trainer) -> Start:
    refs, o = trainer.train.refs, trainer.scorer.objective
    trainer.model.eval()
    still = trainer._measure(trainer.train)
    trainer.model.train()
    seen, _ = trainer._gradient(np.arange(len(trainer.train)))
    trainer.model.eval()
    gap, apart = guard.gaps(still, refs, o)
    sides = [seen.get(f"drift/{side}", np.zeros(1)) for side in ("chosen", "rejected")]
    return Start(
        gap, apart, float(np.max(sides)), float(seen["loss"].mean()),
        float(guard.closed_form(refs, seen, o)[0].mean()), guard.gaps(seen, refs, o)[0],
    )  # fmt: skip


def start_with(trainer: Trainer, preset: str) -> Start:
    """The same trainer's start under another objective. Its own has to pool features."""
    scorer = trainer.scorer
    scorer.objective = Objective(**{**PRESETS[preset], "top_k": K})
    scorer.measure_kl = scorer.objective.constraint == "kl"
    return start_of(trainer)


def gradient_of(trainer: Trainer, indices) -> np.ndarray:
    """The flat float32 gradient of the adapters' arrays."""
    trainer.model.train()
    _, gradient = trainer._gradient(np.asarray(indices))
    trainer.model.eval()
    return np.concatenate([np.array(g).ravel() for _, g in arrays_of(gradient)])


class _ManyProcesses(Ranks):
    """The first of many, that asks the others nothing."""

    def sum(self, tree):
        return tree

    def gather(self, values, part, count):
        return dict(values)


def divided(trainer: Trainer, pair: int, other: int, divisor: int) -> np.ndarray:
    """The two pairs' part of the gradient of an update of `divisor` pairs."""
    trainer.model.train()
    indices = np.full(divisor, pair)
    indices[divisor // 2] = other
    ranks = _ManyProcesses(size=divisor // 2)
    ground = Ground(trainer.scorer, trainer.train, trainer.config, ranks)
    _, gradient = GRADIENTS["backward"](ground, indices, 0)
    trainer.model.eval()
    return np.concatenate([np.array(g).ravel() for _, g in arrays_of(gradient)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def stir(trainer: Trainer, size: float = 0.05) -> None:
    """Adapters of random values, the same for every trainer: B no longer 0."""
    rng = np.random.default_rng(5)
    for name, array in list(adapters.parameters(trainer.model)):
        moved = np.array(array) + size * rng.normal(size=array.shape)
        adapters.update(trainer.model, {name: mx.array(moved.astype(np.float32))})
