"""A 4-bit folder on a CPU: the quantised model's own logits, at the float32 model's speed.

    python scripts/checks/quantized.py [--model FOLDER --quantized FOLDER]

Prints the largest difference of the dequantised model's logits from those of mlx's quantised
matmul on a short input, and the median time of a training step on both folders, taken in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

from fpo_mlx.config import Objective, TrainConfig
from fpo_mlx.demo.smollm2 import model_folders
from fpo_mlx.model import adapters
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.records import Site, TokenPair
from fpo_mlx.sae import load_sae
from fpo_mlx.train.scoring import Scorer

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx_lm import utils  # isort: skip

SAE = Path(__file__).resolve().parents[2] / "fpo_mlx" / "demo" / "sae"


def logit_difference(folder: Path) -> tuple[float, float]:
    """(largest difference, largest logit) of our load against mlx-lm's own quantised layers."""
    tokens = mx.array([[1, 504, 3575, 282, 4649, 314]])
    quantized = utils.load_model(folder)[0](tokens).astype(mx.float32)
    ours = load_model(folder).model(tokens)
    return mx.abs(ours - quantized).max().item(), mx.abs(quantized).max().item()


def open_step(folder: Path):
    """A function that runs one gradient of FPO on one pair, and its time in seconds."""
    loaded, sae = load_model(folder), load_sae(SAE, decoder=False)
    n, keys = adapters.adapted_paths(loaded.model, 16, 27, None)
    lora = TrainConfig().lora
    adapters.attach(loaded.model, adapters.AdapterSpec("lora", n, lora["rank"], 20.0, 0.0, keys))
    policy = Policy(loaded.model, loaded.config, [Site(27)])
    scorer = Scorer(policy, [encoder_of(sae)], Objective())
    rng = np.random.default_rng(0)
    pair = TokenPair(*(rng.integers(5, 49000, n).astype(np.int32) for n in (128, 90, 70)), 0)
    refs = scorer.reader.scores([pair])

    def loss():
        return scorer.losses([pair], refs, grad=True)[0].losses.mean()

    value_and_grad = nn.value_and_grad(loaded.model, loss)

    def step() -> float:
        start = time.perf_counter()
        mx.eval(value_and_grad())
        return time.perf_counter() - start

    return step


def main() -> None:
    folders = model_folders()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=folders.full)
    parser.add_argument("--quantized", type=Path, default=folders.quantized)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    difference, largest = logit_difference(args.quantized)
    print(f"logits: largest difference {difference:.2e}, largest logit {largest:.1f}")
    steps = [open_step(folder) for folder in (args.model, args.quantized)]
    times = [[step() for step in steps] for _ in range(args.repeats + 1)][1:]  # first: warm-up
    full, quantized = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(q / f for f, q in times)
    print(f"step: float32 {full:.2f} s, 4-bit folder {quantized:.2f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
