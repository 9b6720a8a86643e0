"""What tiny SAE fixtures are made of: random weights, files of every kind, float64 primitives."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

D, F, K, LAYER = 12, 40, 5, 3
Encode = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Made:
    path: Path
    encode: Encode  # float64 [N, D] -> [N, F]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    format: str
    site: str | None  # str(Site)
    make: Callable[[Path, np.random.Generator], Made]
    pickled: bool = False


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def jump(pre: np.ndarray, threshold: Any) -> np.ndarray:
    return np.where(pre > threshold, relu(pre), 0)


def top(pre: np.ndarray, k: int, rank: np.ndarray | None = None) -> np.ndarray:
    """The k largest of every row, one row at a time."""
    out = np.zeros_like(pre)
    for row, by in zip(range(len(pre)), pre if rank is None else rank, strict=True):
        best = np.argsort(-by)[:k]
        out[row, best] = pre[row, best]
    return out


class Weights(dict):
    """Random float32 tensors by name, made when first asked for; `wide` gives float64."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.rng = rng

    def add(self, name: str, *shape: int, scale: float = 0.4, positive: bool = False) -> None:
        array = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self[name] = np.abs(array) if positive else array

    def wide(self, name: str) -> np.ndarray:
        return self[name].astype(np.float64)


def canonical(rng: np.random.Generator, lower: bool = False) -> Weights:
    """W_enc [D, F], W_dec [F, D], b_enc, b_dec."""
    w = Weights(rng)
    w.add("w_enc" if lower else "W_enc", D, F)
    w.add("w_dec" if lower else "W_dec", F, D)
    w.add("b_enc", F)
    w.add("b_dec", D)
    return w


def linear(rng: np.random.Generator, encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    """torch's Linear: weight [out, in]."""
    w = Weights(rng)
    w.add(f"{encoder}.weight", F, D)
    w.add(f"{encoder}.bias", F)
    w.add(f"{decoder}.weight", D, F)
    w.add(f"{decoder}.bias", D)
    return w


def write(folder: Path, name: str, text: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def save(folder: Path, name: str, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name)
    return folder / name


# --- torch files by hand: the pickle opcodes that torch.save emits -----------------------------
_TORCH = {"float32": "FloatStorage", "int32": "IntStorage", "int64": "LongStorage"}


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _value(value: Any, storages: dict[str, bytes]) -> bytes:
    if isinstance(value, dict):
        items = b"".join(_text(k) + _value(v, storages) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    key = str(len(storages))
    storages[key] = value.tobytes()
    value = np.array(value, order="C")  # keeps a scalar's empty shape
    strides = [s // value.itemsize for s in value.strides]
    kind = _TORCH[str(value.dtype)].encode()
    storage = b"((" + _text("storage") + b"ctorch\n" + kind + b"\n" + _text(key) + _text("cpu")
    storage += _value(value.size, storages) + b"tQ"
    numbers = [
        b"(" + b"".join(_value(int(n), storages) for n in ns) + b"t"
        for ns in (value.shape, strides)
    ]
    rest = _value(0, storages) + numbers[0] + numbers[1] + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + rest + b"tR"


def save_torch(path: Path, tree: dict[str, Any], pickled: bytes | None = None) -> Path:
    """A file as torch.save writes it; `pickled` replaces the description (for hostile files)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    storages: dict[str, bytes] = {}
    described = b"\x80\x02" + _value(tree, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled or described)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path
