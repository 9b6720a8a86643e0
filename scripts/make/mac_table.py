"""Tables by the formulas of `plan`: what trains on Macs of 8, 16 and 36 GB (docs/memory.md), and
which judge fits there (docs/pairs.md).

    python scripts/make/mac_table.py

Shapes are those of the published config.json files; nothing is loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpo_mlx.machine import answering, device
from fpo_mlx.machine.fits import Case
from fpo_mlx.machine.memory import (
    Adapted,
    Lengths,
    ModelShape,
    SaeShape,
    Setup,
    Tiles,
    total,
)

BITS = 4.5  # of a weight: 4, and scales and biases of groups of 64
MACS = {8: 5.7e9, 16: 11.5e9, 36: 29e9}  # GB of memory -> bytes that Metal recommends at most
RANK, ADAPTED, FEATURES = 8, 16, 1 << 14


def shape(blocks, hidden, heads, kv_heads, head_dim, inner, vocab, *, tied, fused=True):
    one = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    every = blocks * one + vocab * hidden * (1 if tied else 2)
    return ModelShape(
        blocks, hidden, heads, kv_heads, head_dim, inner, vocab, int(every * BITS / 8), one, 2,
        fused_attention=fused,
    )  # fmt: skip


MODELS = {
    "Llama-3.2-1B": shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "Qwen3-4B": shape(36, 2560, 32, 8, 128, 9728, 151936, tied=True),
    "Gemma-2-2b": shape(26, 2304, 8, 4, 256, 9216, 256000, tied=True, fused=False),
    "Llama-3.1-8B": shape(32, 4096, 32, 8, 128, 14336, 128256, tied=False),
}

JUDGES = {
    "Qwen3-4B": MODELS["Qwen3-4B"],
    "Llama-3.1-8B": MODELS["Llama-3.1-8B"],
    "Qwen3-8B": shape(36, 4096, 32, 8, 128, 12288, 151936, tied=False),
    "Qwen3-14B": shape(40, 5120, 40, 8, 128, 17408, 151936, tied=False),
    "Qwen3-32B": shape(64, 5120, 64, 8, 128, 25600, 151936, tied=False),
}
QUESTIONS = (1024, 4096)  # tokens: criteria, conversation and two answers


def case(model: ModelShape, tokens: int, mac: float, checkpoint: bool) -> Case:
    widths = 4 * model.hidden + 2 * model.query + model.keys + 3 * (model.hidden + model.inner)
    inputs = 5 * model.hidden + model.query + model.inner  # of q, k, v, o, gate, up, down
    setup = Setup(
        model.blocks - ADAPTED, model.blocks - 1, RANK * ADAPTED * widths,
        grad_checkpoint=checkpoint, adapted=Adapted(ADAPTED * inputs),
    )  # fmt: skip
    half = tokens // 2
    pair = Lengths(half, tokens - half, tokens - half)
    tiles = Tiles.of(device.gpu("metal", mac))
    return Case(model, (SaeShape(FEATURES, model.hidden),), setup, tiles, (pair,))


def cell(model: ModelShape, tokens: int, mac: float) -> str:
    plain, spared = (case(model, tokens, mac, checkpoint).peak for checkpoint in (False, True))
    if plain <= mac:
        return f"{plain / 1e9:.1f} GB"
    return f"ckpt, {spared / 1e9:.1f} GB" if spared <= mac else f"no ({spared / 1e9:.1f} GB)"


def table() -> str:
    head = [f"{tokens:,} tokens, {gb} GB" for tokens in (512, 2048) for gb in MACS]
    lines = [f"| model | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, model in MODELS.items():
        cells = [cell(model, tokens, mac) for tokens in (512, 2048) for mac in MACS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judges() -> str:
    head = ["weights", *(f"question of {n:,} tokens" for n in QUESTIONS), "fits into a Mac of"]
    lines = [f"| judge, 4 bits | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, model in JUDGES.items():
        peaks = [total(answering.judge_terms(model, n)) for n in QUESTIONS]
        smallest = next((f"{gb} GB" for gb, most in MACS.items() if peaks[-1] <= most), "none")
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (model.weights, *peaks))
        lines.append(f"| {name} | {sizes} | {smallest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), judges(), sep="\n\n")
