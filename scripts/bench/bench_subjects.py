"""What is measured: one training step of ours under every objective, and mlx-lm's SFT step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from bench_measure import Local
from mlx.utils import tree_flatten

from fpo_mlx.config import PRESETS, Objective, TrainConfig
from fpo_mlx.model import adapters
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.pipeline.device_check import speed
from fpo_mlx.records import PairScore, SaeWeights, Site, TokenPair
from fpo_mlx.train.checkpoint import AdapterFolder
from fpo_mlx.train.drift import Controller
from fpo_mlx.train.metrics import ScoredPairs
from fpo_mlx.train.optimizer import gradient_norm
from fpo_mlx.train.scoring import Scorer
from fpo_mlx.train.trainer import Trainer

# The rate is so small that every step of a case is the first one: random pairs would else drive
# the loss to 0 and its gradient into denormal numbers, which a CPU multiplies slowly.
RANK, SCALE, LAYERS, RATE = 8, 20.0, 16, 1e-9
LORA = {"rank": RANK, "scale": SCALE, "layers": LAYERS, "learning_rate": RATE}
FIRE = 2.5  # threshold of the random SAE in standard deviations: about 1 % of features fire


@dataclass(frozen=True)
class World:
    """One base model, seen twice: with our taps and adapters, and with mlx-lm's adapters."""

    path: Path
    config: dict[str, Any]
    policy: Policy
    sft: nn.Module
    site: Site
    first_adapted: int
    weights: int  # bytes of the base model

    @property
    def vocab(self) -> int:
        return self.policy.vocab_size


def open_world(path: Path, sae_layer: int | None = None) -> World:
    """Load the model once; both views share its arrays.

    sae_layer: default the last block, so that both adapt the same blocks.
    """
    loaded, other = load_model(path), load_model(path)
    other.model.update(loaded.model.parameters())
    mx.eval(other.model.parameters())
    weights = nbytes(loaded.model.parameters())
    last = len(loaded.model.layers) - 1
    site = Site(last if sae_layer is None else sae_layer)
    n, keys = adapters.adapted_paths(loaded.model, min(LAYERS, site.layer + 1), site.layer, None)
    mx.random.seed(0)
    adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, RANK, SCALE, 0.0, keys))
    lora = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    speed.mlx_lm_lora(other.model, min(LAYERS, last + 1), lora)
    policy = Policy(loaded.model, loaded.config, [site])
    first = site.layer + 1 - n
    return World(Path(path), loaded.config, policy, other.model, site, first, weights)


def nbytes(tree: Any) -> int:
    return sum(v.nbytes for _, v in tree_flatten(tree) if isinstance(v, mx.array))


def make_pair(prompt: int, chosen: int, rejected: int, vocab: int, index: int = 0) -> TokenPair:
    """Random token ids: what they say changes neither time nor memory."""
    draw = np.random.default_rng((prompt, chosen, rejected, index))
    parts = [draw.integers(0, vocab, n).astype(np.int32) for n in (prompt, chosen, rejected)]
    return TokenPair(parts[0], parts[1], parts[2], index)


def random_sae(world: World, width: int, pair: TokenPair) -> SaeWeights:
    """JumpReLU with random directions; the scale is taken from the activations of a pair."""
    rows = np.array(world.policy.rows([pair]).tapped[0].astype(mx.float32))  # [R, D]
    size = math.sqrt(float((rows**2).mean()) * rows.shape[1])
    draw = np.random.default_rng(width)
    directions = draw.standard_normal((width, rows.shape[1]), dtype=np.float32)  # [F, D]
    directions /= size
    return SaeWeights(
        activation="jumprelu",
        w_enc=directions.T,
        b_enc=np.zeros(width, dtype=np.float32),
        threshold=np.full(width, FIRE, dtype=np.float32),
        site=world.site,
    )


def objective(preset: str) -> Objective:
    return Objective(**PRESETS[preset])


def make_scorer(world: World, preset: str, sae: SaeWeights | None) -> Scorer:
    """The preset's scorer; only the constraint `features` looks at the SAE."""
    wanted = objective(preset)
    encoders = [encoder_of(sae)] if sae is not None and wanted.needs_sae else []
    return Scorer(world.policy, encoders, wanted)


def score(world: World, pairs: Sequence[TokenPair], sae: SaeWeights | None) -> list[PairScore]:
    """The reference's rows, with features if there is an SAE."""
    scorer = make_scorer(world, "fpo" if sae else "dpo", sae)
    return [scored for pair in pairs for scored in scorer.reader.scores([pair])]


def make_trainer(
    scorer: Scorer, pairs: Sequence[TokenPair], refs: Sequence[PairScore], micro: int
) -> Trainer:
    config = TrainConfig(
        batch_size=len(pairs), micro_batch_size=micro, learning_rate=RATE, iters=1 << 20
    )
    nowhere = AdapterFolder(Path("/nonexistent"), {})
    return Trainer(scorer, ScoredPairs(pairs, refs), None, config, nowhere)


def update(trainer: Trainer, gradient: Any) -> None:
    """Clip and apply, evaluated: what the trainer does after each gradient."""
    norm = gradient_norm(gradient)
    norm.item()
    trainer._apply(gradient, norm)


def our_step(
    world: World,
    preset: str,
    pairs: Sequence[TokenPair],
    refs: Sequence[PairScore],
    *,
    sae: SaeWeights | None = None,
    scorer: Scorer | None = None,
    share: bool = True,
    micro: int = 1,
    name: str = "",
    drift: Controller | None = None,
) -> Local:
    """Gradient of all pairs and one update, as `Trainer` does it.

    drift: the controller to begin with, where the scorer's objective has one.
    """
    scorer = scorer or make_scorer(world, preset, sae)
    trainer = make_trainer(scorer, pairs, refs, micro)
    if drift is not None:
        trainer._steer(drift)
    everything = np.arange(len(pairs))

    def run() -> None:
        before = world.policy.shares_prompt
        world.policy.shares_prompt = before and share
        trainer.model.train()
        try:
            values, gradient = trainer._gradient(everything)
            update(trainer, gradient)
            if trainer.drift is not None:
                trainer._drifted(trainer.drift, values)
        finally:
            world.policy.shares_prompt = before
            trainer.model.eval()

    encoders = sum(nbytes(vars(encoder)) for encoder in scorer.encoders)
    state = nbytes(trainer.optimizer.state) + nbytes(trainer.model.trainable_parameters())
    label = name or (preset if share else f"{preset} plain")
    return Local(label, run, world.weights + state + encoders)


def sft_step(world: World, pair: TokenPair, name: str = "mlx-lm sft") -> Local:
    """mlx-lm's own step, as the device check takes it."""
    optimizer_state = 2 * nbytes(world.sft.trainable_parameters())
    resident = optimizer_state + nbytes(world.sft.trainable_parameters())
    return Local(name, speed.sft_step(world.sft, pair), world.weights + resident)


def bare_forward(
    model: nn.Module, head: Callable[[mx.array], mx.array], pair: TokenPair
) -> mx.array:
    """mlx-lm alone, no gradient: the prompt once, each response from its cache, response logits.

    Returns: one number that depends on all logits.
    """
    from mlx_lm.models.cache import make_prompt_cache

    backbone, caches = model.model, make_prompt_cache(model)
    backbone(mx.array(pair.prompt[None, :-1]), cache=caches)
    sums = []
    for response in pair.responses:
        own = make_prompt_cache(model)
        for mine, shared in zip(own, caches, strict=True):
            mine.state = shared.state
        tail = np.concatenate([pair.prompt[-1:], response[:-1]])
        hidden = backbone(mx.array(tail[None]), cache=own)[0]  # [n, D]
        sums.append(mx.logsumexp(head(hidden), axis=-1).sum())
    return sum(sums[1:], sums[0])
