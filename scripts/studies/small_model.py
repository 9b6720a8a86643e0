"""A small chat model trained here in minutes, and an SAE of it: a second model for the studies.

    python scripts/studies/small_model.py --chats chats.jsonl --output small

A Llama of 4 blocks and 192 dimensions with a byte-level BPE of 2,048 tokens, trained on the rows'
messages with ChatML around them; then `fpo-mlx sae train` on the last block. It speaks badly, but
its features are a trained model's and not those of random weights. Some 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from texts import ROOT, rows, say, shared

from fpo_mlx import machine

machine.set_up()  # before MLX is there
sys.path.append(str(ROOT / "tests" / "support"))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.optimizers import (  # noqa: E402
    AdamW,
    clip_grad_norm,
    cosine_decay,
    join_schedules,
    linear_schedule,
)
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402
from tiny_tokenizer import build_tiny_tokenizer  # noqa: E402

from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.storage import files  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192,
    "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 2048,
    "max_position_embeddings": 1024, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
WINDOW, BATCH, PEAK = 192, 4, 1e-3  # tokens of a row, rows of an update, learning rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chats", type=Path, default=shared("data", "chats.jsonl"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=700)
    parser.add_argument("--sae-tokens", type=int, default=400_000)
    o = parser.parse_args()
    chats = [row["messages"] for row in rows(o.chats)[:3000]]
    folder = o.output / "model"
    if not (folder / "model.safetensors").exists():
        train(chats, folder, o.updates)
    sae = ["--layer", "3", "--width", "1024", "--k", "16", "--training-tokens", o.sae_tokens]
    subprocess.run(
        [sys.executable, "-m", "fpo_mlx", "sae", "train", "--model", folder, "--data", o.chats,
         *map(str, sae), "--output", o.output / "sae"],
        check=True,
    )  # fmt: skip


def train(chats: list, folder: Path, updates: int) -> None:
    """A model from random weights. Adam at thrice the rate, unclipped, stayed with word counts."""
    texts = tuple(turn["content"] for chat in chats[:2000] for turn in chat)
    build_tiny_tokenizer(folder, vocabulary=CONFIG["vocab_size"], lines=texts)
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    warm = max(1, min(50, updates // 10))
    fall = cosine_decay(PEAK, max(1, updates - warm), PEAK / 20)
    rate = join_schedules([linear_schedule(0.0, PEAK, warm), fall], [warm])
    optimizer = AdamW(rate, weight_decay=0.01)
    step = nn.value_and_grad(model, loss)
    for number, tokens in zip(range(1, updates + 1), batches(chats, folder), strict=False):
        value, slopes = step(model, tokens)
        optimizer.update(model, clip_grad_norm(slopes, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
        if number % 20 == 0:
            say(f"update {number} of {updates}: {value.item():.3f} nats per token")
    files.write_json(folder / "config.json", CONFIG)
    weights = {k: v for k, v in tree_flatten(model.parameters()) if "rope" not in k}
    with files.atomic_path(folder / "model.safetensors") as work:
        mx.save_safetensors(str(work), weights, {"format": "mlx"})


def loss(model: Model, tokens: mx.array) -> mx.array:
    """tokens (rows, WINDOW + 1)."""
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def batches(chats: list, folder: Path) -> Iterator[mx.array]:
    """Rows of packed chats, again and again in another order: (BATCH, WINDOW + 1)."""
    tokenizer = load_tokenizer(folder)
    texts = tokenizer.encode([tokenizer.render(chat, None, prompt=False) for chat in chats])
    stream = np.concatenate(texts)
    count, rng = len(stream) // (WINDOW + 1), np.random.default_rng(0)
    packed = stream[: count * (WINDOW + 1)].reshape(count, WINDOW + 1)
    while True:
        for chosen in rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH):
            yield mx.array(packed[chosen])


if __name__ == "__main__":
    main()
