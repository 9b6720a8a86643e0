"""The torch backend's log-probs in half precision, against float64 from the same hidden rows."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest

pytest.importorskip("torch")

import tiny_models
import torch
from tiny_make import for_transformers

from fpo_mlx.records import TokenPair
from fpo_mlx.reference.torch_backend import TorchBackend, head

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHARPER = 4.0  # a tiny model's logits are small, and hardly rounded


def opened(family: str, folder, dtype: str) -> TorchBackend:
    """Each response alone, so that its hidden rows can be had once more."""
    source = for_transformers(tiny_models.MAKERS[family](folder))
    backend = TorchBackend(source, device="cpu", dtype=dtype, share_prompt=False)
    backend.tokens_per_batch = 1
    norms = {n: p for n, p in backend._model.base_model.named_parameters() if p.ndim == 1}
    final = next(n for n in reversed(norms) if n.endswith(("norm.weight", "ln_f.weight")))
    with torch.no_grad():
        norms[final].mul_(SHARPER)
    return backend


def exact(backend: TorchBackend, prompt: np.ndarray, response: np.ndarray) -> float:
    """The head in float64, on the rows that the backbone gives in half precision."""
    model, wide = backend._model, deepcopy(backend._model).double()
    tokens = torch.from_numpy(np.concatenate([prompt, response[:-1]])[None].astype(np.int64))
    with torch.no_grad():
        out = model.base_model(input_ids=tokens, use_cache=False)
        rows = out.last_hidden_state[:, -len(response) :].double()
        wide.base_model.forward = lambda *args, **kwargs: type(out)(last_hidden_state=rows)
        logits = wide(input_ids=tokens[:, -len(response) :], use_cache=False).logits[0]
    assert logits.dtype == torch.float64
    every = logits.log_softmax(dim=1).numpy()
    return float(every[np.arange(len(response)), response].sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "granite", "gpt2", "cohere2"])
def test_logits_of_a_model_in_half_precision_are_not_rounded_to_it(family, dtype, tmp_path):
    backend = opened(family, tmp_path / "model", dtype)
    rng = np.random.default_rng(0)
    prompt, *responses = (rng.integers(3, tiny_models.VOCAB, n).astype(np.int32) for n in (4, 9, 5))
    (scores,) = backend.score([TokenPair(prompt, *responses, index=0)])
    for response, score in zip(responses, scores, strict=True):
        assert score.logps == pytest.approx(exact(backend, prompt, response), abs=1e-4)


def test_tiles_of_the_output_matrix_change_nothing(tmp_path, monkeypatch):
    backend = opened("llama", tmp_path / "model", "bfloat16")
    ids = np.arange(5, 12, dtype=np.int32)
    pair = TokenPair(ids, ids + 1, ids + 2, index=0)
    whole = backend.score([pair])
    monkeypatch.setattr(head, "WIDE_ELEMENTS", 7 * tiny_models.HIDDEN)
    (got,), (want,) = backend.score([pair]), whole
    assert [s.logps for s in got] == pytest.approx([s.logps for s in want], rel=1e-6)


def test_where_pytorch_sums_halves_in_float32_itself_nothing_is_widened(tmp_path, monkeypatch):
    seen = []

    def product(a, b, *, out_dtype):  # as on CUDA, where no test runs
        seen.append((a.dtype, b.dtype))
        return a.to(out_dtype) @ b.to(out_dtype)

    plain = opened("llama", tmp_path / "plain", "bfloat16")
    assert not plain._head._sums_wide
    monkeypatch.setattr(torch, "mm", product)
    backend = opened("llama", tmp_path / "model", "bfloat16")
    ids = np.arange(5, 12, dtype=np.int32)
    pair = TokenPair(ids, ids + 1, ids + 2, index=0)
    (got,), (want,) = backend.score([pair]), plain.score([pair])
    assert [s.logps for s in got] == pytest.approx([s.logps for s in want], rel=1e-6)
    assert len(seen) > 1
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
