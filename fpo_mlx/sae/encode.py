"""SAE encode and decode in plain numpy: the reference that the other backends are held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights

ROWS = 2048  # rows at a time, so that intermediates stay small
_OF_FEATURES = ("b_enc", "threshold", "gate_scale", "gate_bias", "act_scale")


def encode(sae: SaeWeights, x: np.ndarray) -> np.ndarray:
    """Feature activations, float32 [N, F], of x [N, D_in]. Formula: `SaeWeights`.

    Raises SaeError if x has another width.
    """
    x = _checked(sae, x)
    acts = np.empty((len(x), sae.n_features), dtype=np.float32)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        for tile, part in encode_tiles(sae, x[rows], sae.n_features):
            acts[rows, tile] = part
    return acts


def encode_tiles(sae: SaeWeights, x: np.ndarray, width: int) -> Iterator[tuple[slice, np.ndarray]]:
    """The same, about `width` features at a time and each tile of the encoder read once.

    Yields which features, and their activations [N, width].
    """
    x = normalized(sae, _checked(sae, x))
    x = x if sae.b_in is None else x - sae.b_in
    step = max(width // sae.group, 1) * sae.group
    tiles = [slice(at, at + step) for at in range(0, sae.n_features, step)]
    if sae.activation in ("topk", "abstopk") and len(tiles) > 1:
        yield from _top_tiles(sae, x, tiles)
        return
    for tile in tiles:
        own = _tile(sae, tile)
        acts = _activated(own, x @ own.w_enc)
        yield tile, acts if own.act_scale is None else acts * own.act_scale


def _tile(sae: SaeWeights, tile: slice) -> SaeWeights:
    """The encoder of consecutive features; of whole groups, if it has groups."""
    vectors = {name: getattr(sae, name) for name in _OF_FEATURES}
    some = {name: None if a is None else a[tile] for name, a in vectors.items()}
    w_enc, k = sae.w_enc[:, tile], sae.k
    if sae.activation == "groupmax":
        k = w_enc.shape[1] // sae.group
    return replace(sae, w_enc=w_enc, k=k, **some)


def _top_tiles(
    sae: SaeWeights, x: np.ndarray, tiles: list[slice]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Top-k over all features: the best so far are carried from tile to tile."""
    assert sae.k is not None
    signed, rows = sae.activation == "abstopk", np.arange(len(x))[:, None]
    best, places = np.empty((len(x), 0), np.float32), np.empty((len(x), 0), np.int64)
    for tile in tiles:
        pre = x @ sae.w_enc[:, tile] + sae.b_enc[tile]
        own = _largest(np.abs(pre) if signed else pre, sae.k)
        best = np.concatenate([best, pre[rows, own]], axis=1)
        places = np.concatenate([places, own + tile.start], axis=1)
        kept = _largest(np.abs(best) if signed else best, sae.k)
        best, places = best[rows, kept], places[rows, kept]
    acts = best if signed else np.maximum(best, 0)
    acts = acts if sae.act_scale is None else acts * sae.act_scale[places]
    for tile in tiles:
        row, column = np.nonzero((places >= tile.start) & (places < tile.stop))
        width = len(range(*tile.indices(sae.n_features)))
        part = np.zeros((len(x), width), np.float32)
        part[row, places[row, column] - tile.start] = acts[row, column]
        yield tile, part


def decode(sae: SaeWeights, acts: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Reconstruction, float32 [N, D_out], of acts [N, F]; x [N, D_in] undoes the normalisation.

    A transcoder's output belongs to another place than its input, so nothing is undone there.
    """
    if sae.w_dec is None or sae.b_dec is None:
        raise SaeError(f"{sae.source}: has no decoder, so nothing can be reconstructed.")
    return restored(sae, acts.astype(np.float32, copy=False) @ sae.w_dec, x)


def restored(sae: SaeWeights, decoded: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What `decode` makes of acts @ w_dec [N, D_out]."""
    recon = decoded + sae.b_dec
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
    top = _largest(rank, k)
    kept = np.zeros_like(values)
    np.put_along_axis(kept, top, np.take_along_axis(values, top, axis=1), axis=1)
    return kept


def _largest(rank: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest of each row are, [n, min(k, width)]."""
    k = min(k, rank.shape[1])
    return np.argpartition(rank, -k, axis=1)[:, -k:]


def _group_max(values: np.ndarray, groups: int) -> np.ndarray:
    """The largest of each of `groups` equal contiguous groups, 0 elsewhere. values: [n, F]."""
    split = values.reshape(len(values), groups, -1)  # [n, groups, F / groups]
    best = split.argmax(axis=2)[..., None]
    kept = np.zeros_like(split)
    np.put_along_axis(kept, best, np.take_along_axis(split, best, axis=2), axis=2)
    return kept.reshape(values.shape)
