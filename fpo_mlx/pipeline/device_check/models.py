"""Models of random weights at real shapes, made in memory: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.core.features import Encoder
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model import adapters
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.model.trees import arrays_of, blocks_of, cast_floats
from fpo_mlx.pipeline.device_check.places import Size
from fpo_mlx.records import SaeWeights, Site, TokenPair
from fpo_mlx.train.metrics import ScoredPairs
from fpo_mlx.train.scoring import Scorer

Packing = Literal["affine", "mxfp4"]
GROUPS = {"affine": 64, "mxfp4": 32}
RANK, SCALE, LAYERS = 8, 20.0, 16
FIRE = 2.5  # standard deviations of an activation above which a feature fires: 1 % of them
SOFT_CAPS = {
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256.0,
}  # fmt: skip
# Gemma-2-2b, by its published configuration
GEMMA = {
    "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26,
    "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "vocab_size": 256_000, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, **SOFT_CAPS,
}  # fmt: skip


def llama(size: Size, blocks: int, vocab: int) -> dict[str, Any]:
    """config.json of a model of this width."""
    return {
        "model_type": "llama", "hidden_size": size.hidden, "num_hidden_layers": blocks,
        "intermediate_size": size.inner, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "head_dim": size.hidden // size.heads,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }  # fmt: skip


def gemma(size: Size) -> dict[str, Any]:
    """The model that times and memory are of: Gemma-2-2b, or a small one like it."""
    if size.name == "real":
        return GEMMA
    own = {"model_type": "gemma2", "tie_word_embeddings": True, **SOFT_CAPS}
    return llama(size, size.blocks, size.vocab) | own


def make(
    config: dict[str, Any], dtype: mx.Dtype, packing: Packing | None = None, seed: int = 0
) -> nn.Module:
    """A frozen mlx-lm model of random weights, made a matrix at a time."""
    mx.random.seed(seed)
    model = _built(config, packing, dtype)
    for _, array in arrays_of(model.parameters()):
        mx.eval(array)
    model.freeze()
    model.eval()
    return model


def again(config: dict[str, Any], model: nn.Module, packing: Packing | None = None) -> nn.Module:
    """A second model around the same arrays."""
    other = _built(config, packing)
    other.update(model.parameters())
    other.freeze()
    other.eval()
    return other


def _built(
    config: dict[str, Any], packing: Packing | None, dtype: mx.Dtype | None = None
) -> nn.Module:
    """mlx-lm's model of a configuration, its layers packed; nothing is computed yet."""
    with leaning_on("mlx-lm", "how it makes a model of a configuration"):
        from mlx_lm.models import gemma2 as gemma2_code
        from mlx_lm.models import llama as llama_code

        code: Any = {"llama": llama_code, "gemma2": gemma2_code}[config["model_type"]]
        model = code.Model(code.ModelArgs.from_dict(config))
    if dtype is not None:
        cast_floats(model, dtype)
    if packing is not None:
        nn.quantize(model, group_size=GROUPS[packing], bits=4, mode=packing)
    return model


@dataclass(frozen=True)
class World:
    """A model with adapters and a tap, and pairs that its reference has scored."""

    config: dict[str, Any]
    policy: Policy
    encoders: tuple[Encoder, ...]
    data: ScoredPairs

    @property
    def model(self) -> nn.Module:
        return self.policy.model

    def scorer(self, preset: str) -> Scorer:
        objective = Objective(**PRESETS[preset])
        return Scorer(self.policy, self.encoders if objective.needs_sae else (), objective)


def world(
    config: dict[str, Any], model: nn.Module, features: int, pairs: Sequence[TokenPair], seed: int
) -> World:
    """Fresh adapters on the last blocks, whose A is drawn by numpy: the same on every device."""
    last = len(blocks_of(model)) - 1
    count, keys = adapters.adapted_paths(model, min(LAYERS, last + 1), last, None)
    adapters.attach(model, adapters.AdapterSpec("lora", count, RANK, SCALE, 0.0, keys))
    rng = np.random.default_rng(seed)
    drawn = {
        name: mx.array(rng.normal(size=a.shape, scale=a.shape[0] ** -0.5).astype(np.float32))
        for name, a in adapters.parameters(model)
        if name.endswith("lora_a")
    }
    adapters.update(model, drawn)
    policy = Policy(model, config, [Site(last)])
    encoder = encoder_of(_sae(policy, features, pairs[0], seed))
    found = World(config, policy, (encoder,), ScoredPairs(pairs, []))
    reader = found.scorer("fpo").reader
    refs = [score for pair in pairs for score in reader.scores([pair])]
    return World(config, policy, (encoder,), ScoredPairs(pairs, refs))


def _sae(policy: Policy, features: int, pair: TokenPair, seed: int) -> SaeWeights:
    """JumpReLU with random directions, thresholds by what the model really holds there."""
    seen = np.array(policy.rows([pair]).tapped[0].astype(mx.float32))  # [R, D]
    directions = np.random.default_rng(seed).standard_normal((features, seen.shape[1]), np.float32)
    directions /= np.sqrt((seen**2).mean() * seen.shape[1])
    return SaeWeights(
        "jumprelu", directions.T, np.zeros(features, np.float32),
        threshold=np.full(features, FIRE, np.float32), site=policy.sites[0],
    )  # fmt: skip


def random_pairs(sizes: Sequence[tuple[int, int, int]], vocab: int, seed: int) -> list[TokenPair]:
    """Random token ids. sizes: tokens of prompt, chosen and rejected."""
    rng = np.random.default_rng(seed)
    drawn = ([rng.integers(0, vocab, n).astype(np.int32) for n in size] for size in sizes)
    return [TokenPair(*tokens, index=i) for i, tokens in enumerate(drawn)]
