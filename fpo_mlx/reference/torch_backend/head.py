"""Log-probs off hidden rows: the model's own head, in float32 whatever type the weights have.

In bfloat16 logits between 16 and 32 lie an eighth apart, which would be most of a log-prob's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

HEAD_ELEMENTS = 1 << 25  # logits in memory at once: 128 MB in float32
WIDE_ELEMENTS = 1 << 25  # of the output matrix that are widened at once
HALVES = (torch.bfloat16, torch.float16)


class Head:
    """What the model makes of the rows behind its final norm."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        layer = model.get_output_embeddings()
        halves = isinstance(layer, nn.Linear) and layer.weight.dtype in HALVES
        self._layer: Any = layer if halves else None  # the one to compute in float32
        self._sums_wide = halves and sums_wide(device, layer.weight.dtype)

    def token_logps(self, output: type, hidden: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """hidden: [R, D] after the final norm, targets: [R] -> float64 [R], softmax in float32.

        output: what the model's backbone answers with.
        """
        size = max(1, HEAD_ELEMENTS // self._vocabulary)
        parts = []
        for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self._logits(output, rows).float()  # [r, V]
            picked = logits.gather(1, wanted[:, None])[:, 0]
            parts.append(picked - logits.logsumexp(dim=1))
        return torch.cat(parts).cpu().numpy().astype(np.float64)

    def _logits(self, output: type, rows: torch.Tensor) -> torch.Tensor:
        """The model's own map to logits, soft-caps and scales included. [r, D] -> [r, V].

        The model is called as usual, but its backbone answers with the rows it is given.
        """
        dummy = torch.zeros((1, len(rows)), dtype=torch.int64, device=self._device)
        given = output(last_hidden_state=rows[None])
        with (
            _in_place(self._model.base_model, lambda *args, **kwargs: given),
            _in_place(self._layer, self._linear),
        ):
            return self._model(input_ids=dummy, use_cache=False).logits[0]

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        """The output layer, of halves as they are, its products and sums in float32."""
        weight, bias = self._layer.weight, self._layer.bias
        rows = x.reshape(-1, x.shape[-1])
        if self._sums_wide:
            out = torch.mm(rows, weight.T, out_dtype=torch.float32)
        else:
            tiles = weight.split(max(1, WIDE_ELEMENTS // weight.shape[1]))
            out = torch.cat([rows.float() @ tile.float().T for tile in tiles], dim=1)
        out = out if bias is None else out + bias.float()
        return out.reshape(*x.shape[:-1], -1)


def sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of this type into float32 here (on CUDA since 2.8)."""
    one = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


@contextmanager
def _in_place(module: Any, forward: Any) -> Iterator[None]:
    """Within it the module's `forward` is this one; its hooks stay. None: nothing is done."""
    if module is None:
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own shows again
