"""Measure every architecture against transformers and write the table of docs/models.md.

    python scripts/make/model_table.py            # a minute on one core; needs torch

The figures are what `tests/parity/test_architectures.py` holds to bounds, on the same tiny models.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
HEAD = (
    "| architecture | sites | hidden states | logits | gradients | prompt once | mind |\n"
    "|---|---|---|---|---|---|---|\n"
)
MIND = {  # where mlx-lm computes something else than transformers, as its code says
    "gemma": "exact gelu for the published tanh-gelu",
    "gpt_neox": "tanh-gelu for the published exact gelu",
    "gemma2": "no window: another model beyond 4096 tokens",
    "mistral": "no window (v0.1 has one of 4096 tokens)",
    "gemma3_text": "embedding scale rounded to bfloat16 in every dtype",
    "gemma3": "text only; as `gemma3_text`",
    "gemma4": "text only",
    "qwen2_moe": "routing weights never renormalised",
    "gpt_oss": "yarn bounds rounded (published: not)",
}


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from fpo_mlx import machine

    machine.set_up()
    import torch
    from architectures import prove
    from tiny_models import MAKERS

    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as root:
        for name, maker in MAKERS.items():
            proof = prove(maker(Path(root) / name))
            print(f"{name}: {proof}", file=sys.stderr)
            figures = [f"{x:.0e}" for x in (proof.hidden, proof.logits, proof.gradient)]
            shares = "yes" if proof.shares_prompt else "no"
            cells = [f"`{name}`", str(len(proof.kinds)), *figures, shares, MIND.get(name, "")]
            lines.append("| " + " | ".join(cells).rstrip() + " |\n")
    page = ROOT / "docs" / "models.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = BEGIN + HEAD + "".join(lines) + END
    page.write_text(before + table + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
