"""Everything that the next step depends on, and its one file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from fpo_mlx.core.dictionary import Arrays, Rule
from fpo_mlx.core.selection import largest
from fpo_mlx.errors import ModelError
from fpo_mlx.machine.parallel import Ranks
from fpo_mlx.model.trees import read_arrays
from fpo_mlx.saetrain.rows import Position
from fpo_mlx.storage import files
from fpo_mlx.storage.runfolder import RunFolder

STATE = "checkpoint.safetensors"
CONFIG = "cfg.json"  # of the SAE that a run leaves: the last file of it
_SECTIONS = ("params", "first", "second")


@dataclass
class State:
    """Where a run stands, between two steps. Inputs are (x - centre) * scale of the raw rows."""

    params: Arrays
    first: Arrays  # Adam's moments
    second: Arrays
    unused: np.ndarray  # int64 [F], tokens since a feature's last use
    centre: np.ndarray  # float32 [D]
    scale: float
    step: int = 0
    position: Position = field(default_factory=Position)
    threshold: float = 0.0  # running mean of the smallest active value
    l0: float = 0.0  # running mean
    metrics_bytes: int = 0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # since the last report
    warmed: int = 0  # gradients that the moments hold from before the first step
    lengths: np.ndarray | None = None  # float32 [F], of the decoder rows as written; None: 1


def centre_of(rows: np.ndarray, kind: str, steps: int = 20) -> np.ndarray:
    """Mean, or geometric median by Weiszfeld's iteration. [n, D] -> float32 [D]."""
    wide = rows.astype(np.float64)
    point = wide.mean(axis=0)
    if kind == "geometric_median":
        for _ in range(steps):
            away = 1 / np.maximum(np.sqrt(np.square(wide - point).sum(axis=1)), 1e-8)
            point = (away[:, None] * wide).sum(axis=0) / away.sum()
    return point.astype(np.float32)


def fresh(rows: np.ndarray, rule: Rule, *, seed: int, centre: str) -> State:
    """Start from a sample of raw rows [n, D].

    The decoder's rows have length 1, the encoder is their transpose times the factor at which the
    first reconstructions fit best: k of many random rows overlap, and overshoot without it.
    JumpReLU's thresholds begin where k features of a token are active.
    """
    n_features, rng = rule.groups[-1], np.random.default_rng([seed, 4])
    point = centre_of(rows, centre)
    scale = scale_of(rows)
    w_dec = rng.standard_normal((n_features, rows.shape[1]), dtype=np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    params = {
        "w_enc": mx.array(w_dec),
        "w_dec": mx.array(w_dec),
        "b_enc": mx.zeros(n_features),
        "b_dec": mx.zeros(rows.shape[1]),
    }
    inputs = mx.array((rows[:1024] - point) * scale)
    gain = _gain(params, inputs, rule.k)
    params["w_enc"] = params["w_enc"] * gain
    pre = inputs @ params["w_enc"].T
    flat = pre.reshape(1, -1)
    index = largest(flat, min(rule.k * len(inputs), flat.shape[1] - 1))
    bound = max(float(mx.take_along_axis(flat, index, axis=-1).min()), 1e-3)
    if rule.architecture == "jumprelu":
        params["log_threshold"] = mx.full(n_features, float(np.log(bound)))
    begun = standing(params, point, scale, l0=float(rule.k))
    begun.threshold = bound
    return begun


def standing(params: Arrays, centre: np.ndarray, scale: float, *, l0: float) -> State:
    """Before the first step: moments of nothing, every feature just used."""
    first, second = ({name: mx.zeros_like(v) for name, v in params.items()} for _ in range(2))
    unused = np.zeros(params["b_enc"].shape[0], dtype=np.int64)
    return State(params, first, second, unused, centre, scale, l0=l0)


def scale_of(rows: np.ndarray) -> float:
    """What brings raw rows [n, D] to a variance of 1."""
    return float(1 / np.sqrt(np.square(rows - rows.mean(axis=0), dtype=np.float64).mean()))


def _gain(params: Arrays, inputs: mx.array, k: int) -> mx.array:
    """Least-squares factor of the reconstruction from the k largest; inputs: [n, D]."""
    pre = inputs @ params["w_enc"].T
    index = largest(pre, k)
    values = mx.maximum(mx.take_along_axis(pre, index, axis=-1), 0.0)
    recon = mx.put_along_axis(mx.zeros_like(pre), index, values, axis=-1) @ params["w_dec"]
    return (recon * inputs).sum() / mx.maximum((recon * recon).sum(), 1e-12)


def agreed(begun: State, ranks: Ranks) -> State:
    """The first process's start, on each: another machine may round otherwise."""
    if ranks.size == 1:
        return begun
    numbers = mx.array([begun.scale, begun.threshold, begun.l0])
    own = {"centre": mx.array(begun.centre), "numbers": numbers}
    if begun.lengths is not None:
        own["lengths"] = mx.array(begun.lengths)
    params, own = ranks.from_first([begun.params, own])
    scale, threshold, l0 = own["numbers"].tolist()
    lengths = np.array(own["lengths"]) if "lengths" in own else None
    return replace(
        begun, params=params, centre=np.array(own["centre"]), scale=scale, threshold=threshold,
        l0=l0, lengths=lengths,
    )  # fmt: skip


def save(folder: Path, state: State) -> None:
    """One file, one rename: a run that is killed at any point goes on from a whole state."""
    arrays: Arrays = {}
    for section in _SECTIONS:
        arrays |= {f"{section}.{name}": value for name, value in getattr(state, section).items()}
    arrays |= {"unused": mx.array(state.unused), "centre": mx.array(state.centre)}
    if state.lengths is not None:
        arrays["lengths"] = mx.array(state.lengths)
    numbers = {
        "scale": state.scale,
        "step": state.step,
        "position": asdict(state.position),
        "threshold": state.threshold,
        "l0": state.l0,
        "metrics_bytes": state.metrics_bytes,
        "window": state.window,
        "warmed": state.warmed,
    }
    with files.atomic_path(folder / STATE) as temporary:
        mx.save_safetensors(str(temporary), arrays, metadata={"state": json.dumps(numbers)})


def load(path: Path) -> State:
    """From its file. Raises ModelError when the file is damaged."""
    try:
        arrays, metadata = read_arrays(path)
        numbers = json.loads(metadata["state"])
        params, first, second = (
            {k[len(s) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{s}.")}
            for s in _SECTIONS
        )
        numbers["position"] = Position(**numbers["position"])
        unused, centre = np.array(arrays["unused"]), np.array(arrays["centre"])
        lengths = np.array(arrays["lengths"]) if "lengths" in arrays else None
        return State(params, first, second, unused, centre, **numbers, lengths=lengths)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}). Begin the run anew: --overwrite in place of "
            "--resume, or another --output."
        ) from error


def run_folder(path: Path) -> RunFolder:
    return RunFolder(path, Path(STATE), "--output", "sae train", CONFIG, whole=True)
