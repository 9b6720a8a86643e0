"""Shared by the tests of model, trainer, adapters and fusing: random pairs, SAEs, tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fpo_mlx.config import PRESETS, Objective, TrainConfig
from fpo_mlx.model import adapters
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.records import SaeWeights, Site, TokenPair
from fpo_mlx.train.checkpoint import AdapterFolder
from fpo_mlx.train.metrics import ScoredPairs
from fpo_mlx.train.scoring import Scorer
from fpo_mlx.train.trainer import Trainer

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
F, K = 48, 6
SIZES = [(9, 5, 8), (4, 7, 3), (1, 4, 4), (6, 2, 9), (3, 6, 6), (8, 1, 5), (2, 9, 2), (5, 3, 1)]


def random_pairs(sizes: list[tuple[int, int, int]], seed: int = 0) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    draw = [[rng.integers(3, 300, n).astype(np.int32) for n in size] for size in sizes]
    return [TokenPair(*tokens, index=i) for i, tokens in enumerate(draw)]


def random_sae(activation: str, width: int, site: Site, seed: int = 1) -> SaeWeights:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    extra: dict = {}
    if activation == "jumprelu":
        extra["threshold"] = np.abs(draw(F)) * 0.5
    elif activation == "gated":
        extra |= {"gate_scale": np.exp(0.1 * draw(F)), "gate_bias": draw(F) * 0.3}
    elif activation in ("topk", "abstopk"):
        extra["k"] = 9
    elif activation == "groupmax":
        extra["k"] = 12
    if activation == "identity":
        eye, zeros = np.eye(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
        return SaeWeights("identity", eye, zeros, site=site)
    return SaeWeights(
        activation, draw(width, F) / width**0.5, draw(F) * 0.1, b_in=draw(width) * 0.1,
        site=site, **extra,
    )  # fmt: skip


def scorer_with_lora(folder, objective, saes, *, share_prompt=True, keys=KEYS, **policy):
    """Tiny model with random non-zero LoRA on blocks 0 and 1; reference = fresh adapters."""
    loaded = load_model(folder)
    n, paths = adapters.adapted_paths(loaded.model, 2, 1, keys)
    adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, 3, 2.0, 0.0, paths))
    reference = dict(adapters.parameters(loaded.model))
    values = random_adapters(loaded.model)
    scorer = Scorer(
        Policy(loaded.model, loaded.config, [s.site for s in saes], share_prompt=share_prompt,
               **policy),
        [encoder_of(sae) for sae in saes],
        objective,
    )  # fmt: skip
    adapters.update(loaded.model, reference)
    scorer.freeze_reference(reference)
    return scorer, values


def random_adapters(model, size: float = 0.15, seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=array.shape).astype(np.float32) * size
        for name, array in adapters.parameters(model)
    }


def open_trainer(
    folder: Path,
    out: Path,
    pairs: list[TokenPair],
    *,
    preset: str = "fpo",
    valid: list[TokenPair] | None = None,
    objective: dict[str, Any] | None = None,
    fine_tune_type: str = "lora",
    dropout: float = 0.0,
    share_prompt: bool = True,
    stop=lambda: None,
    start: bool = True,
    keys: tuple[str, ...] = KEYS,
    **train: Any,
) -> Trainer:
    """A trainer as the pipeline builds it: adapters on blocks 0 and 1, SAE after block 1."""
    settings = {"seed": 3, "steps_per_report": 1, "learning_rate": 1e-2, "batch_size": 2}
    config = TrainConfig(**{**settings, **train})
    o = Objective(**{**PRESETS[preset], "top_k": K, **(objective or {})})
    mx.random.seed(config.seed)
    loaded = load_model(folder)
    n, paths = adapters.adapted_paths(loaded.model, 2, 1, keys)
    spec = adapters.AdapterSpec(fine_tune_type, n, 3, 2.0, dropout, paths)
    adapters.attach(loaded.model, spec)
    width = int(loaded.config.get("hidden_size") or 32)
    saes = [random_sae("topk", width, Site(1))] if o.pooled else []
    policy = Policy(
        loaded.model, loaded.config, [sae.site for sae in saes],
        share_prompt=share_prompt, grad_checkpoint=config.grad_checkpoint,
    )  # fmt: skip
    scorer = Scorer(policy, [encoder_of(sae) for sae in saes], o)
    loaded.model.eval()  # the reference is scored without dropout
    scored = [ScoredPairs(p, scorer.reader.scores(p)) if p else None for p in (pairs, valid)]
    target = AdapterFolder(out, spec.as_config(str(folder)))
    if start:
        target.start({"settings": {}, "fingerprints": {}})
    assert scored[0] is not None
    return Trainer(scorer, scored[0], scored[1], config, target, stop)


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in adapters.parameters(trainer.model)}


CLOCKS = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "seconds"}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or a memory gauge says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def logits_of(model, tokens) -> np.ndarray:
    return np.array(model(mx.array([list(tokens)])).astype(mx.float32))[0]
