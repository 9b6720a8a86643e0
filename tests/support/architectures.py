"""What is measured of every architecture: this project on mlx-lm's model against transformers'.

`prove(folder)` compares, on one tiny model whose weights both libraries load (`tiny_models`), the
hidden states at every site of every block, the logits, and the gradient of the FPO loss by every
LoRA matrix with the float64 oracle. The tests hold the figures to bounds, and
`scripts/make/model_table.py` prints them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
from helpers import K, random_adapters, random_pairs, random_sae

from fpo_mlx.config import PRESETS, Objective
from fpo_mlx.errors import ModelError
from fpo_mlx.model import adapters
from fpo_mlx.model.load import LoadedModel, load_model, read_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.model.taps import tap_point
from fpo_mlx.model.trees import blocks_of
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site, SiteKind, TokenPair
from fpo_mlx.train.scoring import Scorer

# Two pairs of different lengths. Both responses of the first run as one batch, of the second one
# by one; windows of 6 tokens are crossed in prompts and responses; mlx-lm sorts tokens by expert
# from 64 (token, expert) on, which some of the calls reach and some do not.
PAIRS = random_pairs([(18, 17, 19), (7, 9, 3)], seed=2)
SCALE = 2.0  # of the LoRA layers
# Weights that transformers fuses into arrays of its own: routed experts and what chooses them.
EXPERTS = re.compile(r"(^|\.)(switch_mlp|experts|router|gate|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class Proof:
    """Largest differences to the oracle. Relative ones are by the largest value of an array."""

    kinds: tuple[SiteKind, ...]  # the sites that exist in some block
    hidden: float  # relative to max(1, largest value of the site)
    logits: float  # absolute
    gradient: float  # relative
    matrices: int  # how many LoRA matrices were compared
    shares_prompt: bool
    once: float  # prompt once (or, without it, gradient checkpointing) to the plain path; relative


def prove(folder: Path, pairs: Sequence[TokenPair] = PAIRS, truth: Path | None = None) -> Proof:
    """Measure one model. truth: the folder for transformers, where it is another one."""
    kinds, hidden, logits = forward_gap(folder, truth or folder)
    ours = gradients(folder, pairs)
    gradient = gap_of(ours, oracle_gradients(truth or folder, pairs, ours))
    plain = gradients(folder, pairs, share_prompt=False)
    cheap = gradients(folder, pairs, grad_checkpoint=True)
    once = max(gap_of(ours, plain), gap_of(cheap, plain))
    return Proof(kinds, hidden, logits, gradient, len(ours.grads), ours.shares_prompt, once)


# Forward ------------------------------------------------------------------------------------------


def sites_of(model: nn.Module) -> list[Site]:
    """Every site of every block that can be tapped."""
    found = []
    for layer, block in enumerate(blocks_of(model)):
        for kind in SITE_KINDS:
            try:
                tap_point(block, Site(layer, kind))
            except ModelError:
                continue
            found.append(Site(layer, kind))
    return found


def forward_gap(folder: Path, truth: Path) -> tuple[tuple[SiteKind, ...], float, float]:
    """Kinds of sites; largest difference over all sites and blocks; that of the logits.

    The prompt is one token, so that the responses' rows are all positions but the last.
    """
    loaded = load_model(folder)
    model = oracle.load_oracle(truth)
    sites = sites_of(loaded.model)
    policy = Policy(loaded.model, loaded.config, sites)
    (pair,) = random_pairs([(1, 18, 18)], seed=4)
    rows = policy.rows([pair])
    logits, gaps = np.array(policy.head(rows.hidden)), []
    for i, response in enumerate(pair.responses):
        own = slice(i * len(response), (i + 1) * len(response))
        sequence = [*pair.prompt, *response[:-1]]
        wanted, wanted_logits = oracle.hidden_and_logits(model, sequence, *sites)
        for got, want in zip(rows.tapped, wanted, strict=True):
            difference = np.abs(np.array(got)[own] - want.numpy()).max()
            gaps.append(difference / max(1.0, float(want.abs().max())))
        logits[own] -= wanted_logits.numpy()
    kinds = tuple(kind for kind in SITE_KINDS if any(site.kind == kind for site in sites))
    return kinds, float(max(gaps)), float(np.abs(logits).max())


# Gradient -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    losses: np.ndarray  # [B]
    grads: dict[str, np.ndarray]  # of the mean loss, by mlx-lm's name of the LoRA matrix
    values: dict[str, np.ndarray]  # the LoRA matrices
    saes: tuple[SaeWeights, ...]
    shares_prompt: bool


OBJECTIVE = Objective(**{**PRESETS["fpo"], "top_k": K, "alpha": 1.0})


def gradients(
    folder: Path, pairs: Sequence[TokenPair], *, packed: bool = False, **policy: Any
) -> Gradients:
    """As the trainer does it, with LoRA on all dense layers of all blocks and two SAEs.

    One SAE reads the last block's output before the final norm (the paper's place), one reads
    what an MLP in the middle adds to the stream. packed: leave quantised weights as they are, as
    on Apple silicon.
    """
    loaded = read_model(folder) if packed else load_model(folder)
    loaded.model.freeze()
    last = len(blocks_of(loaded.model)) - 1
    width = _width(loaded)
    saes = (
        random_sae("jumprelu", width, Site(last)),
        random_sae("topk", width, Site(1, "mlp_out"), seed=5),
    )
    return gradients_of(loaded, pairs, saes, **policy)


def _width(loaded: LoadedModel) -> int:
    text = loaded.config.get("text_config", loaded.config)
    return int(text.get("hidden_size") or text["n_embd"])


def gradients_of(
    loaded: LoadedModel, pairs: Sequence[TokenPair], saes: tuple[SaeWeights, ...], **policy: Any
) -> Gradients:
    model, last = loaded.model, len(blocks_of(loaded.model)) - 1
    n, paths = adapters.adapted_paths(model, -1, last, dense_layers(model))
    adapters.attach(model, adapters.AdapterSpec("lora", n, 3, SCALE, 0.0, paths))
    scorer = Scorer(
        Policy(model, loaded.config, [sae.site for sae in saes if sae.site], **policy),
        [encoder_of(sae) for sae in saes],
        OBJECTIVE,
    )
    refs = scorer.reader.scores(pairs)  # the adapters are fresh
    values = random_adapters(model, size=0.1)
    adapters.update(model, {k: mx.array(v) for k, v in values.items()})
    model.train()  # as the trainer does

    def mean_loss():
        losses, _ = scorer.losses(pairs, refs, grad=True)
        return losses.losses.mean(), losses.losses

    (_, losses), grads = nn.value_and_grad(model, mean_loss)()
    flat = {k: np.array(v) for k, v in nn.utils.tree_flatten(grads)}
    return Gradients(np.array(losses), flat, values, saes, scorer.policy.shares_prompt)


def dense_layers(model: nn.Module) -> set[str]:
    """Names within their blocks of all linear layers that are not experts or their routers."""
    return {
        name
        for block in blocks_of(model)
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and not EXPERTS.search(name)
    }


def oracle_gradients(folder: Path, pairs: Sequence[TokenPair], ours: Gradients) -> Gradients:
    model = oracle.load_oracle(folder)
    lora = oracle.attach_lora(model, ours.values, scale=SCALE)
    setup = oracle.Setup(k=K, alpha=OBJECTIVE.alpha)
    rows, grads = oracle.loss_and_grads(model, lora, list(pairs), setup, taps=ours.saes)
    losses = np.array([row["loss"] for row in rows])
    return Gradients(losses, grads, ours.values, ours.saes, False)


def gap_of(got: Gradients, want: Gradients) -> float:
    """Largest difference of a gradient or loss, each relative to its largest value."""
    assert set(got.grads) == set(want.grads), "other matrices were adapted"
    pairs = [(got.losses, want.losses)]
    pairs += [(got.grads[name], want.grads[name]) for name in want.grads]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
