"""What every family's reader needs: its input, and the checks on its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.registry import facts
from fpo_mlx.sae.stored import all_finite, by_rows
from fpo_mlx.sae.tensorfile import TensorFile
from fpo_mlx.storage.files import parse_json


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say about a file that does not say it itself."""

    allow_pickle: bool = False
    decoder: bool = True  # False: leave w_dec and b_dec out (half of the memory)
    k: int | None = None  # top-k, where the files do not hold it
    llama_scope_gate: Literal["authors", "saelens"] = "authors"
    norm_scaling_factor: float | None = None  # inputs are multiplied by it
    name: str = ""  # the name the user gave (hub id, release): read together with the path
    on_disk: bool = False  # matrices stay in their file


@dataclass(frozen=True)
class Source:
    """One SAE on disk: its weight file and the configuration beside it."""

    tensors: TensorFile
    options: LoadOptions = field(default_factory=LoadOptions)

    @property
    def file(self) -> Path:
        return self.tensors.path

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def name(self) -> str:
        """Path and the user's own name: what is searched for layer, site and k."""
        return f"{self.file.as_posix()}|{self.options.name}"

    def json(self, *names: str) -> dict[str, Any] | None:
        """The first of these files beside the weights, parsed; None if there is none."""
        for name in names:
            if (self.folder / name).is_file():
                return read_json(self.folder / name)
        return None

    def k(self, stated: Any, where: Path) -> int:
        """The user's k, else the one that the files state. Raises SaeError without either."""
        if self.options.k is not None:
            return count(self.options.k, "k", self.file)
        if stated is None:
            raise SaeError(
                f"{where}: k is not there, and a top-k SAE cannot be read without it. "
                "Give the k it was trained with as --sae-k."
            )
        return count(stated, "k", where)

    def factor(self) -> float | None:
        """The input scale that the user or a norm_scaling_factor.json gives, if any."""
        if self.options.norm_scaling_factor is not None:
            return _positive(self.options.norm_scaling_factor, str(self.file))
        for folder in (self.folder, *self.folder.parents[:2]):
            sidecar = folder / "norm_scaling_factor.json"
            if sidecar.is_file():
                return _positive(_parsed(sidecar), str(sidecar))
        return None


def known_factor(source: Source) -> float | None:
    """The same, else the input scale that the shipped table has for this file."""
    given = source.factor()
    if given is not None:
        return given
    known = facts(source.name)
    return known.factor if known else None


def _positive(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SaeError(f"{where}: the norm scaling factor is {value!r}; wanted a positive number.")
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SaeError with the file's name for anything else."""
    value = _parsed(path)
    if not isinstance(value, dict):
        raise SaeError(f"{path}: wanted a JSON object, found {type(value).__name__}.")
    return value


def _parsed(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaeError(f"{path} cannot be read as JSON: {error}. Download it again.") from error


def count(value: Any, name: str, where: Path) -> int:
    """A whole number of at least 1 from a configuration (SAELens writes k as 8.0)."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    if not whole or not float(value).is_integer() or value < 1:
        raise SaeError(f"{where}: {name} is {value!r}; wanted a whole number of at least 1.")
    return int(value)


def transposed(array: np.ndarray) -> np.ndarray:
    """[F, D] -> [D, F], a view: what goes to a device is turned back, and nothing is copied."""
    return array.T


def matrix(source: Source, *names: str) -> np.ndarray:
    """A two-dimensional tensor, under the first of `names` that the file has."""
    array = source.tensors.first(*names, stay=source.options.on_disk)
    scale = source.tensors.get(f"{names[0]}_scale")
    if scale is not None:  # our own 8-bit variant: one scale per feature
        array = array * scale
    if array.ndim != 2:
        raise SaeError(
            f"{source.file}: {names[0]} has shape {list(array.shape)}; wanted two dimensions."
        )
    return array


def decoder_norms(w_dec: np.ndarray) -> np.ndarray:
    """Euclidean length of each feature's decoder row, [F], from w_dec [F, D_out]."""
    parts = [np.linalg.norm(rows, axis=1) for rows in by_rows(w_dec)]
    return np.concatenate(parts).astype(np.float32)


def inverse(norms: np.ndarray) -> np.ndarray:
    """1 / norms, and 0 for a feature whose decoder row is zero (it can never be active)."""
    return np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)


def assert_width(found: int, wanted: Any, what: str, where: Path) -> None:
    """Raise if a configuration contradicts the tensors."""
    try:
        same = wanted is None or int(wanted) == found  # some write it as a text
    except (TypeError, ValueError, OverflowError):
        same = False
    if not same:
        raise SaeError(
            f"{where}: the configuration says {what} = {wanted}, the weights have {found}. "
            "Configuration and weights belong to different SAEs."
        )


def finished(sae: SaeWeights) -> SaeWeights:
    """The record itself, once every shape, k and value fits. Raises SaeError otherwise."""
    where = sae.source or "SAE"
    if sae.w_enc.ndim != 2:
        raise SaeError(f"{where}: w_enc has shape {list(sae.w_enc.shape)}; wanted [d_in, features]")
    d_in, n_features = sae.w_enc.shape
    if d_in == 0 or n_features == 0:
        raise SaeError(f"{where}: w_enc has shape [{d_in}, {n_features}]; wanted at least [1, 1].")
    wanted = {name: (n_features,) for name in ("b_enc", "threshold", "gate_scale", "gate_bias")}
    wanted |= {"act_scale": (n_features,), "b_in": (d_in,)}
    if sae.w_dec is not None:
        wanted |= {"w_dec": (n_features, sae.w_dec.shape[-1]), "b_dec": (sae.w_dec.shape[-1],)}
    for name, shape in wanted.items():
        _check_array(where, name, getattr(sae, name), shape)
    _check_array(where, "w_enc", sae.w_enc, sae.w_enc.shape)
    _check_parts(where, sae)
    return sae


def _check_array(where: str, name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if array.shape != shape:
        raise SaeError(
            f"{where}: {name} has shape {list(array.shape)}; wanted {list(shape)}. "
            "The file is damaged, or was read as the wrong format (see --sae-format)."
        )
    if array.dtype != np.float32 or not all_finite(array):
        raise SaeError(f"{where}: {name} is {array.dtype} or not finite; wanted finite float32.")


def _check_parts(where: str, sae: SaeWeights) -> None:
    needs: Mapping[str, tuple[str, ...]] = {
        "jumprelu": ("threshold",),
        "gated": ("gate_scale", "gate_bias"),
        "topk": ("k",),
        "abstopk": ("k",),
        "groupmax": ("k",),
    }
    for name in needs.get(sae.activation, ()):
        if getattr(sae, name) is None:
            raise SaeError(f"{where}: a {sae.activation} SAE without {name}; the file lacks it.")
    if sae.k is not None and not 1 <= sae.k <= sae.n_features:
        raise SaeError(f"{where}: k is {sae.k}; wanted 1 to {sae.n_features} (its features).")
    if sae.activation == "groupmax" and sae.n_features % (sae.k or 1):
        raise SaeError(f"{where}: {sae.n_features} features do not split into {sae.k} groups.")
