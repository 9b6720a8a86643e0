"""Starting from an SAE that is there: its weights in the trainer's units, and back without loss.

A published SAE stands on raw activations, its decoder rows of any length. The trainer's inputs are
(x - centre) * scale and its decoder rows have length 1. The centre is the SAE's own b_dec, so that
the trained b_dec begins at 0; the lengths are kept in the state and put back when it is written.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from fpo_mlx.core.dictionary import Rule
from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae import fit
from fpo_mlx.sae.encode import encode
from fpo_mlx.saetrain.state import State, scale_of, standing

SAMPLE = 2048  # rows that the L0 of the start is measured on
UNEVEN = 0.01  # of the decoder rows' lengths: above it a top-k SAE chooses others once folded
LEAST = 1e-12  # a threshold at or below 0 reads as this: it is kept as a logarithm


def check(sae: SaeWeights, architecture: str) -> None:
    """Raises SaeError for an SAE that `sae train` cannot go on with, saying why."""
    where = f"--init {sae.source or 'SAE'}"
    if sae.activation not in ("topk", "jumprelu"):
        raise SaeError(
            f"{where}: is a {sae.activation} SAE; training goes on with topk and jumprelu ones. "
            "Start from another SAE, or leave --init out."
        )
    if sae.activation != architecture:
        raise SaeError(
            f"{where}: is a {sae.activation} SAE, and --architecture is {architecture}. "
            f"Give --architecture {sae.activation}."
        )
    if sae.w_dec is None or sae.b_dec is None:
        raise SaeError(f"{where}: has no decoder, so there is nothing to train on.")
    if sae.transcoder or sae.w_dec.shape[1] != sae.d_in:
        raise SaeError(
            f"{where}: is a transcoder; `sae train` makes SAEs that read what they write."
        )
    if sae.normalize != "none" or sae.centred:
        kind = "centred" if sae.centred else sae.normalize
        raise SaeError(
            f"{where}: normalises each token's activations ({kind}), which `sae train` does not. "
            "Start from an SAE of raw activations."
        )
    if sae.activation == "topk":
        _check_even(where, sae)


def _check_even(where: str, sae: SaeWeights) -> None:
    """Folding lengths into the encoder must not change which k are the largest."""
    assert sae.w_dec is not None
    for name, array in (("decoder rows", _lengths(sae.w_dec)), ("scales", sae.act_scale)):
        if array is not None and array.max() > (1 + UNEVEN) * array.min():
            raise SaeError(
                f"{where}: its {name} differ in length ({array.min():.3g} to {array.max():.3g}), "
                "and training keeps them at one, by which a top-k SAE would choose other "
                "features. Start from one whose decoder rows have one length."
            )


def target_l0(sae: SaeWeights, rows: np.ndarray) -> int:
    """k to train at: what the SAE states, or else what it has on raw rows [n, D]."""
    return max(1, round(fit.stated_l0(sae) or _l0(sae, rows)))


def _l0(sae: SaeWeights, rows: np.ndarray) -> float:
    return float((encode(sae, rows[:SAMPLE]) > 0).sum(axis=1).mean())


def started(sae: SaeWeights, rows: np.ndarray, rule: Rule) -> State:
    """The state that `finish.finished` turns into `sae` again, on a sample of raw rows [n, D].

    With acts' = acts * length, u = (x - c) * s and c = b_dec:
    pre_u = (u @ W + s * (b_enc + (b_dec - b_in) @ W)) * length * act_scale. In float64, since a
    bias of a published SAE can be a hundred times an activation's change.
    """
    check(sae, rule.architecture)
    assert sae.w_dec is not None
    assert sae.b_dec is not None
    w_enc, scale = sae.w_enc.astype(np.float64), scale_of(rows)
    lengths = _lengths(sae.w_dec)
    if rule.architecture == "topk":  # one for all: the order of a token's features stays
        lengths = np.full_like(lengths, lengths.mean())
    factor = lengths * (1.0 if sae.act_scale is None else sae.act_scale.astype(np.float64))
    silent = factor <= 0  # of a scale of 0: never active, and so it stays until it learns
    shift = sae.b_dec.astype(np.float64) - (0.0 if sae.b_in is None else sae.b_in)
    b_enc = np.where(silent, -1.0, factor * (sae.b_enc + shift @ w_enc) * scale)
    params = {
        "w_enc": mx.array((w_enc * factor).T.astype(np.float32)),
        "w_dec": mx.array((sae.w_dec / lengths[:, None]).astype(np.float32)),
        "b_enc": mx.array(b_enc.astype(np.float32)),
        "b_dec": mx.zeros(sae.d_in),
    }
    if sae.threshold is not None:
        bound = np.maximum(np.where(silent, 1.0, sae.threshold * factor * scale), LEAST)
        params["log_threshold"] = mx.array(np.log(bound).astype(np.float32))
    begun = standing(params, sae.b_dec.astype(np.float32), scale, l0=_l0(sae, rows))
    begun.lengths = lengths.astype(np.float32)
    return begun


def _lengths(w_dec: np.ndarray) -> np.ndarray:
    """float64 [F]; 1 for a row of zeros, which has no direction yet."""
    found = np.sqrt(np.square(w_dec, dtype=np.float64).sum(axis=1))
    return np.where(found > 0, found, 1.0)
