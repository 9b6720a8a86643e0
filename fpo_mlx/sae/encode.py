"""SAE encode and decode in plain numpy: the reference that the other backends are held against."""

from __future__ import annotations

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights

_ROWS = 2048  # rows at a time, so that intermediates stay small


def encode(sae: SaeWeights, x: np.ndarray) -> np.ndarray:
    """Feature activations, float32 [N, F], of x [N, D_in]. Formula: `SaeWeights`.

    Raises SaeError if x has another width.
    """
    x = _checked(sae, x)
    acts = np.empty((len(x), sae.n_features), dtype=np.float32)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        acts[rows] = _encode_rows(sae, x[rows])
    return acts


def decode(sae: SaeWeights, acts: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Reconstruction, float32 [N, D_out], of acts [N, F]; x [N, D_in] undoes the normalisation.

    A transcoder's output belongs to another place than its input, so nothing is undone there.
    """
    if sae.w_dec is None or sae.b_dec is None:
        raise SaeError(f"{sae.source}: has no decoder, so nothing can be reconstructed.")
    recon = acts.astype(np.float32, copy=False) @ sae.w_dec + sae.b_dec  # [N, D_out]
    if sae.transcoder or (sae.normalize == "none" and not sae.centred):
        return recon
    x = _checked(sae, x)
    if sae.centred:
        return recon + x.mean(axis=1, keepdims=True)
    if sae.normalize == "constant_norm":
        return recon / _constant_norm_scale(x)
    mean = x.mean(axis=1, keepdims=True)
    return recon * x.std(axis=1, ddof=1, keepdims=True) + mean


def normalized(sae: SaeWeights, x: np.ndarray) -> np.ndarray:
    """N(x) of the canonical form, [N, D_in]."""
    if sae.normalize == "layer_norm":
        centred = x - x.mean(axis=1, keepdims=True)
        return centred / (x.std(axis=1, ddof=1, keepdims=True) + np.float32(1e-5))
    if sae.normalize == "constant_norm":
        return x * _constant_norm_scale(x)
    return x


def _constant_norm_scale(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)  # [N, 1]
    return np.float32(np.sqrt(x.shape[1])) / length


def _checked(sae: SaeWeights, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != sae.d_in:
        raise SaeError(
            f"{sae.source or 'SAE'}: the input has shape {list(x.shape)}; wanted [N, {sae.d_in}]."
        )
    return x


def _encode_rows(sae: SaeWeights, x: np.ndarray) -> np.ndarray:
    x = normalized(sae, x)
    raw = (x if sae.b_in is None else x - sae.b_in) @ sae.w_enc  # [n, F]
    acts = _activated(sae, raw)
    return acts if sae.act_scale is None else acts * sae.act_scale


def _activated(sae: SaeWeights, raw: np.ndarray) -> np.ndarray:
    if sae.activation == "gated":
        assert sae.gate_bias is not None
        value = np.maximum(raw * sae.gate_scale + sae.b_enc, 0)
        return np.where(raw + sae.gate_bias > 0, value, 0)
    pre = raw + sae.b_enc  # [n, F]
    if sae.activation == "relu":
        return np.maximum(pre, 0)
    if sae.activation == "jumprelu":
        return np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
    assert sae.k is not None
    if sae.activation == "groupmax":
        return _group_max(np.maximum(pre, 0), sae.k)
    rank = np.abs(pre) if sae.activation == "abstopk" else pre
    kept = _keep_largest(pre, rank, sae.k)
    return kept if sae.activation == "abstopk" else np.maximum(kept, 0)


def _keep_largest(values: np.ndarray, rank: np.ndarray, k: int) -> np.ndarray:
    """values [n, F] where `rank` is among the k largest of its row, 0 elsewhere."""
    top = np.argpartition(rank, -k, axis=1)[:, -k:]  # [n, k]
    kept = np.zeros_like(values)
    np.put_along_axis(kept, top, np.take_along_axis(values, top, axis=1), axis=1)
    return kept


def _group_max(values: np.ndarray, groups: int) -> np.ndarray:
    """The largest of each of `groups` equal contiguous groups, 0 elsewhere. values: [n, F]."""
    split = values.reshape(len(values), groups, -1)  # [n, groups, F / groups]
    best = split.argmax(axis=2)[..., None]
    kept = np.zeros_like(split)
    np.put_along_axis(kept, best, np.take_along_axis(split, best, axis=2), axis=2)
    return kept.reshape(values.shape)
