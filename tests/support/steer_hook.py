"""Steering as a transformers hook does it: what `chat --steer` is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def steered_logits(
    model: Path,
    block: int,
    w_dec: np.ndarray,
    asked: Mapping[int, float | None],
    tokens: np.ndarray,
) -> np.ndarray:
    """Logits [L, V] in float32. asked: amount by feature, None to take its direction out."""
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = torch.tensor(w_dec)

    def hook(module, args, out):
        h = out[0] if isinstance(out, tuple) else out
        gone = [f for f, amount in asked.items() if amount is None]
        if gone:  # least squares: what the directions can tell of h
            w = rows[gone].double().T
            h = h - (w @ torch.linalg.lstsq(w, h[0].double().T).solution).T[None].float()
        for feature, amount in asked.items():
            h = h + (amount or 0) * rows[feature]
        return (h, *out[1:]) if isinstance(out, tuple) else h

    other.model.layers[block].register_forward_hook(hook)
    with torch.no_grad():
        return other(torch.tensor(tokens[None]).long()).logits[0].numpy()
