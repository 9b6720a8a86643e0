"""Trains an SAE as the demo's: TopK on the residual stream of SmolLM2-135M-Instruct, float16.

    python scripts/make/demo_sae.py --chats chats.jsonl --output FOLDER [--model FOLDER]

The text is what scripts/make/demo_text.py writes. The SAE in the package was made by the torch
script that stood here before `fpo-mlx sae train`; the block, width and k are the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fpo_mlx import pipeline
from fpo_mlx.config import SaeTrainConfig
from fpo_mlx.demo import smollm2
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.convert import write_saelens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--training-tokens", type=int, default=2_000_000)
    args = parser.parse_args()

    def say(text: object) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = SaeTrainConfig(
            model=str(args.model or smollm2.model_folders().full), data=args.chats, output=folder,
            layer=27, width=1024, k=32, training_tokens=args.training_tokens,
        )  # fmt: skip
        done = pipeline.sae_train(config, say=say, report=say)
        write_saelens(load_sae(Path(folder)), args.output, "float16")
    print(done.figures)


if __name__ == "__main__":
    main()
