"""Steered logits of a real model against a transformers hook: `chat --steer` in float32.

    python scripts/checks/steered.py --model FOLDER --sae SAE

Three ways (a direction added, one taken out, both at once), features 0 to 5, all
positions. Exits 1 where a logit is off by more than 1e-4 of the largest, or none has moved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "scripts" / "studies")]

from texts import SAE

from fpo_mlx import machine

machine.set_up()  # before anything imports MLX

import mlx.core as mx  # noqa: E402
from steer_hook import steered_logits  # noqa: E402

from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.judge.speaking import Speaker, steering  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.model.reader import encoder_of  # noqa: E402
from fpo_mlx.sae import load_sae  # noqa: E402

QUESTION = [{"role": "user", "content": "Give me three reasons to walk more, as a list."}]
BOUND = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder, in float32")
    parser.add_argument("--sae", type=Path, default=SAE)
    o = parser.parse_args()
    sae, model = load_sae(o.sae), load_model(o.model).model
    assert sae.site is not None
    assert sae.w_dec is not None
    tokens = np.array(load_tokenizer(o.model).prompt_tokens(QUESTION), np.int32)
    plain = np.array(model(mx.array(tokens[None]))[0])
    speaker = Speaker(model, sae.site, encoder_of(sae))
    right = True
    for asked in ({0: 40.0}, {1: None}, {2: -20.0, 3: None, 4: None, 5: 10.0}):
        speaker.steer(steering(sae.w_dec, sae.site, asked))
        ours = np.array(model(mx.array(tokens[None]))[0])
        theirs = steered_logits(o.model, sae.site.layer, sae.w_dec, asked, tokens)
        off, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
        moved = np.abs(ours - plain).max()
        right &= bool(off <= BOUND * largest and moved > 0.01)  # False where one is not a number
        print(f"{asked}: off by {off:.2e} of {largest:.1f}, moved by {moved:.2f}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
