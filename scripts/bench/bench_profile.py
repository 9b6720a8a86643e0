"""The least arithmetic that a step needs, and where a step's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from bench_subjects import RANK, World, make_scorer, make_trainer, update

from fpo_mlx.core import features as F
from fpo_mlx.core.logprobs import token_logps
from fpo_mlx.model.policy import Layout
from fpo_mlx.model.taps import PrefixCache
from fpo_mlx.records import PairScore, SaeWeights, TokenPair


@dataclass(frozen=True)
class Shape:
    """What the count needs of a llama-like config."""

    blocks: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @staticmethod
    def of(config: dict[str, Any]) -> Shape:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            config["num_hidden_layers"],
            hidden,
            config["vocab_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["intermediate_size"],
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of q, k, v, o, gate, up, down."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(d, q), (d, kv), (d, kv), (q, d), (d, self.inner), (d, self.inner), (self.inner, d)]

    @property
    def block(self) -> int:
        return sum(i * o for i, o in self.linears)


@dataclass(frozen=True)
class Floor:
    """FLOPs of one pair: each distinct token once, the head on response rows."""

    prompt_forward: float
    response_forward: float
    backward: float
    head: float  # forward and backward
    attention: float  # part of the first three

    @property
    def step(self) -> float:
        return self.prompt_forward + self.response_forward + self.backward + self.head


def floor(shape: Shape, pair: TokenPair, first_adapted: int) -> Floor:
    """2 FLOPs a weight and token forward, 2 backward (base weights need no gradient) from the first
    adapted block on. The prompt leaves the last block after its keys and values.
    """
    p, tails = len(pair.prompt) - 1, [len(y) for y in pair.responses]
    rows, upper = sum(tails), shape.blocks - first_adapted
    lora = RANK * sum(i + o for i, o in shape.linears)
    last = 2 * sum(i * o for i, o in shape.linears[1:3])  # of the prompt: keys and values
    key = 4 * shape.heads * shape.head_dim  # q.k and p.v
    prompt_attention = key * p * (p + 1) / 2
    tail_attention = key * sum(n * p + n * (n + 1) / 2 for n in tails)
    prompt_block = 2 * shape.block * p + prompt_attention
    tail_block = 2 * shape.block * rows + tail_attention
    prompt = (shape.blocks - 1) * prompt_block + last * p + (upper - 1) * 2 * lora * p
    response = shape.blocks * tail_block + upper * 2 * lora * rows
    back = (upper - 1) * (2 * shape.block * p + 2 * prompt_attention + 4 * lora * p) + last * p
    back += upper * (2 * shape.block * rows + 2 * tail_attention + 4 * lora * rows)
    attention = (shape.blocks - 1 + 2 * (upper - 1)) * prompt_attention
    attention += (shape.blocks + 2 * upper) * tail_attention
    return Floor(prompt, response, back, 4.0 * rows * shape.hidden * shape.vocab, attention)


def matmul_rate(n: int = 2048) -> float:
    """GFLOP/s of one large float32 product, the best of three."""
    a, best = mx.random.normal((n, n)), 1e9
    mx.eval(a)
    for _ in range(3):
        best = min(best, _seconds(lambda: mx.eval(a @ a)))
    return 2 * n**3 / best / 1e9


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def parts(
    world: World, pair: TokenPair, refs: Sequence[PairScore], sae: SaeWeights, repeats: int
) -> dict[str, float]:
    """Median seconds of each part of one FPO step, each evaluated by itself.

    `backward` is what the gradient takes beyond the forward parts.
    """
    rounds = [_one_round(world, pair, refs, sae) for _ in range(repeats + 1)][1:]
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def _one_round(
    world: World, pair: TokenPair, refs: Sequence[PairScore], sae: SaeWeights
) -> dict[str, float]:
    policy, scorer = world.policy, make_scorer(world, "fpo", sae)
    trainer, layout = make_trainer(scorer, [pair], refs, 1), Layout.of([pair])
    out: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = run()
        mx.eval(value)
        out[name] = time.perf_counter() - started
        return value

    caches = [PrefixCache() for _ in policy.model.layers]

    def prompt() -> list[tuple[mx.array, ...]]:
        policy.backbone(mx.array(pair.prompt[None, :-1]), cache=caches)
        return [cache.own for cache in caches]

    timed("prompt forward", prompt)
    whole = _seconds(lambda: mx.eval(_arrays(policy.rows([pair]))))
    out["response forward"] = max(0.0, whole - out["prompt forward"])
    rows = policy.rows([pair])
    mx.eval(_arrays(rows))
    timed(
        "head and log-probs, with their gradient",
        lambda: token_logps(rows.hidden, layout.targets, policy.head, policy.vocab_size),
    )
    timed("SAE pooling", lambda: F.pool(scorer.encoders[0], rows.tapped[0], layout.means())[0])
    timed("SAE distance in all", lambda: scorer._distances(rows, layout, refs, mx.zeros(()), True))
    trainer.model.train()
    found: list[Any] = []
    whole = _seconds(lambda: found.extend(trainer._gradient(np.arange(1))))
    forward = sum(out.values()) - out["SAE pooling"]  # a part of the distance
    out["backward"] = max(0.0, whole - forward)
    out["optimizer"] = _seconds(lambda: update(trainer, found[1]))
    trainer.model.eval()
    out["step"] = whole + out["optimizer"]
    return out


def _arrays(rows: Any) -> list[mx.array]:
    return [rows.hidden, *rows.tapped]


def attention_seconds(world: World, pair: TokenPair) -> float:
    """Attention alone over all blocks of a step: forward everywhere, backward where adapted."""
    shape = Shape.of(world.config)
    p, upper, total = len(pair.prompt) - 1, shape.blocks - world.first_adapted, 0.0
    for queries, keys in [(p, p), *((len(y), p + len(y)) for y in pair.responses)]:
        forward, both = _one_attention(shape, queries, keys)
        total += shape.blocks * forward + upper * max(0.0, both - forward)
    return total


def _one_attention(shape: Shape, queries: int, keys: int) -> tuple[float, float]:
    """Seconds of one block's attention: forward, and forward with backward; the best of three."""
    q = mx.random.normal((1, shape.heads, queries, shape.head_dim))
    k, v = (mx.random.normal((1, shape.kv_heads, keys, shape.head_dim)) for _ in range(2))

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=shape.head_dim**-0.5, mask="causal"
        )

    slope = mx.grad(lambda *a: attend(*a).sum(), argnums=(0, 1, 2))
    mx.eval(q, k, v, slope(q, k, v))
    forward = min(_seconds(lambda: mx.eval(attend(q, k, v))) for _ in range(3))
    both = min(_seconds(lambda: mx.eval(slope(q, k, v))) for _ in range(3))
    return forward, both
