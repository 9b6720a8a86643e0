"""The tiny place that reproduce.py --smoke works in: a random model, two SAEs, a few pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FEATURES = 48
SITES = {"resid": ("resid_post", 2), "mlp": ("mlp_out", 1)}  # name -> kind and block


def make(place: Path) -> tuple[Path, dict[str, Path], Path]:
    """(model, SAEs by name, folder of pairs); what is there already stays."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny_models

    model, source = place / "model", place / "source"
    if not (model / "config.json").exists():
        tiny_models.tiny_llama(model, tokenizer=True)
    saes = {name: place / f"sae-{name}" for name in SITES}
    for name, folder in saes.items():
        if not folder.exists():
            _write_sae(folder, *SITES[name], tiny_models.HIDDEN)
    source.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 8), ("valid", 4)):
        rows = [
            {"prompt": f"{split} {i}?", "chosen": f"Answer {i}.", "rejected": f"Well, {i} or so"}
            for i in range(n)
        ]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, saes, source


def _write_sae(folder: Path, kind: str, block: int, width: int) -> None:
    from fpo_mlx.records import SaeWeights, Site
    from fpo_mlx.sae.convert import write_saelens

    w = np.random.default_rng(block).normal(size=(width, FEATURES)).astype(np.float32) / width**0.5
    zeros = np.zeros(FEATURES, np.float32)
    sae = SaeWeights(
        "relu", w, zeros, w_dec=w.T.copy(), b_dec=np.zeros(width, np.float32),
        site=Site(block, kind), source="random",  # type: ignore[arg-type]
    )  # fmt: skip
    write_saelens(sae, folder)
