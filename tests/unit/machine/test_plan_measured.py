"""Predictions beside peaks that MLX measures: one gradient of a small random model on a CPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import random_pairs  # noqa: E402
from mlx_lm.models import llama, qwen3_next  # noqa: E402

from fpo_mlx.config import PRESETS, Objective  # noqa: E402
from fpo_mlx.machine import device, memory  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.policy import Policy  # noqa: E402
from fpo_mlx.model.trees import blocks_of, cast_floats  # noqa: E402
from fpo_mlx.pipeline.plan import adapted_of, shape_of  # noqa: E402
from fpo_mlx.train.scoring import Scorer  # noqa: E402

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 300,
    "tie_word_embeddings": False,
}  # fmt: skip

QWEN3_NEXT = LLAMA | {  # three blocks of gated delta rule, one of attention
    "model_type": "qwen3_next", "hidden_size": 32, "num_hidden_layers": 4, "head_dim": 16,
    "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True, "rope_theta": 1e4, "partial_rotary_factor": 0.25,
    "max_position_embeddings": 512, "full_attention_interval": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip


def peaks(model, config, size, kind="lora", checkpoint=False):
    """(measured, predicted) bytes of one gradient, above what is there before it."""
    model.freeze()
    last = len(blocks_of(model)) - 1
    shape = shape_of(model, config, share_prompt=True)
    n, paths = adapters.adapted_paths(model, -1, last, None)
    adapters.attach(model, adapters.AdapterSpec(kind, n, 8, 2.0, 0.0, paths))
    count = sum(array.size for _, array in adapters.parameters(model))
    setup = memory.Setup(
        0, last, count, batch_size=1, grad_checkpoint=checkpoint,
        adapted=adapted_of(model, config),
    )  # fmt: skip
    terms = memory.train_terms(shape, (), setup, memory.Tiles.of(device.here()), size)
    before = ("model weights", "SAE weights", "adapters and optimizer", "other")
    return _measured(model, config, size, checkpoint), sum(
        term.bytes for term in terms if term.name not in before
    )


def _measured(model, config, size, checkpoint):
    policy = Policy(model, config, grad_checkpoint=checkpoint)
    scorer = Scorer(policy, [], Objective(**PRESETS["dpo"]))
    pairs = random_pairs([(size.prompt, size.chosen, size.rejected)])
    refs = scorer.reader.scores(pairs)
    model.train()

    def loss(pairs, refs):
        return scorer.losses(pairs, refs, grad=True)[0].losses.sum()

    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss)(pairs, refs))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("dtype", "bits", "kind", "checkpoint"),
    [
        (mx.float32, None, "lora", False),
        (mx.float32, None, "dora", False),
        (mx.bfloat16, None, "lora", False),
        (mx.bfloat16, None, "lora", True),
        (mx.bfloat16, 4, "dora", False),
    ],
)
def test_what_adapters_keep_in_half_precision_and_of_dora_is_predicted(
    dtype, bits, kind, checkpoint
):
    """x A in float32 copies what each layer reads; DoRA keeps its output and what it unpacks."""
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    cast_floats(model, dtype)
    if bits:
        nn.quantize(model, 32, bits)
    with device.using(replace(device.cpu(), widen=False)):
        found, guess = peaks(model, LLAMA, memory.Lengths(96, 64, 64), kind, checkpoint)
    assert guess == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("length", [8, 24])
def test_the_states_that_a_gated_delta_rule_keeps_of_every_token_are_predicted(length):
    """2.3 of them in float32 for each token and block: nearly all of the memory."""
    model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(QWEN3_NEXT))
    size = memory.Lengths(length, length, length)
    assert shape_of(model, QWEN3_NEXT, share_prompt=True).states == (*[2 * 64 * 128] * 3, 0)
    found, guess = peaks(model, QWEN3_NEXT, size)
    assert guess == pytest.approx(found, rel=0.15)


def test_only_blocks_that_a_gradient_goes_through_keep_their_states():
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    plain = shape_of(model, LLAMA, share_prompt=False)
    assert plain.states == (0,) * 6
    shape = replace(plain, states=(10, 0, 10, 0, 20, 0))
    size, tiles = memory.Lengths(5, 4, 4), memory.Tiles.of(device.here())  # 2 x 8 tokens

    def more(first):
        setup = memory.Setup(first, 5, 0)
        peaks = (memory.train_terms(one, (), setup, tiles, size) for one in (shape, plain))
        with_states, without = ({term.name: term.bytes for term in one} for one in peaks)
        return with_states["kept for the backward pass"] - without["kept for the backward pass"]

    assert [more(first) for first in (0, 1, 5)] == pytest.approx(
        [2.3 * 4 * 16 * states for states in (40, 30, 0)]
    )
