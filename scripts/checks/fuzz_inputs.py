"""What fuzz.py feeds: valid inputs of every kind, ways to spoil them, and who reads them."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BIG = "9" * 5000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, 1e-320,
    float("nan"), float("inf"), "", "x", " ", "\x00", "\ud800", "\u202e", "..", "/etc/passwd",
    "nan", "1e9", "features", "user", "assistant", "\n\nHuman: a\n\nAssistant: b", [], {}, [[]],
    [None], [1, 2], {"a": {}}, {"role": "user", "content": "q"}, {"role": "assistant"}, "z" * 3000,
    [0] * 40, [[[[[[[[[[]]]]]]]]]], {"": ""},
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader. make: a spoiled input -> what to call (a fresh closure each time)."""

    name: str
    share: int  # of the inputs, in relation to the others
    make: Callable[[random.Random], Callable[[], Any]]


def spoil(value: Any, chance: random.Random, times: int = 1) -> Any:
    """A copy of a JSON value with some nodes replaced, removed, doubled or renamed."""
    holder = [copy.deepcopy(value)]
    for _ in range(times):
        places = list(_places(holder))
        parent, key = chance.choice(places)
        way = chance.random()
        if way < 0.6:
            parent[key] = copy.deepcopy(chance.choice(ODD))
        elif way < 0.8 and parent is not holder:
            del parent[key]
        elif isinstance(parent, dict):
            parent[chance.choice(("x", "", "role", "k", "type", str(key)))] = parent.pop(key)
        elif parent is not holder:
            parent.insert(0, copy.deepcopy(parent[key]))
    return holder[0]


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def damage(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        at, way = chance.randrange(len(out) + 1), chance.random()
        if way < 0.4 and at < len(out):
            out[at] = chance.randrange(256)
        elif way < 0.55:
            out[at:at] = chance.randbytes(chance.choice((1, 2, 8, 40)))
        elif way < 0.7:
            del out[at : at + chance.choice((1, 2, 8, 100))]
        elif way < 0.8:
            del out[at:]
        elif way < 0.9 and at < len(out):
            out[at : at + 8] = chance.choice((b"\xff" * 8, b"\x00" * 8, b"\x00" * 6 + b"\x10\x00"))
        else:
            out[at:at] = out[: chance.randrange(200)]
    return bytes(out)


def json_bytes(value: Any, chance: random.Random) -> bytes:
    """A spoiled value as text, seldom with damaged bytes or a number of 5000 digits."""
    text = json.dumps(spoil(value, chance, chance.choice((1, 1, 2, 4)))).encode()
    way = chance.random()
    if way < 0.15:
        return damage(text, chance)
    if way < 0.2:
        return text.replace(b"1", BIG.encode(), 1)
    return b"[" * 20000 + text if way < 0.21 else text


def safetensors_bytes(data: bytes, chance: random.Random) -> bytes:
    """A spoiled header before the same values, or damage anywhere."""
    if chance.random() < 0.3:
        return damage(data, chance)
    length = struct.unpack("<Q", data[:8])[0]
    head = json_bytes(json.loads(data[8 : 8 + length]), chance)
    told = chance.choice((len(head),) * 6 + (0, 2**40, 2**63))
    return struct.pack("<Q", told) + head + data[8 + length :]


def npz_bytes(arrays: dict[str, np.ndarray], chance: random.Random) -> bytes:
    """An archive with one spoiled entry, or damage anywhere."""
    out = io.BytesIO()
    hurt = chance.choice(list(arrays))
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, array)
            raw = entry.getvalue()
            archive.writestr(f"{name}.npy", _npy(raw, chance) if name == hurt else raw)
    data = out.getvalue()
    return damage(data, chance) if chance.random() < 0.3 else data


def _npy(raw: bytes, chance: random.Random) -> bytes:
    swaps = (
        (b"(12, 40)", b"(99999999, 99999999)"), (b"(40,)", b"(-4,)"), (b"(40,)", b"(10**9,)"),
        (b"<f4", b"|O"), (b"<f4", b"<U9"), (b"<f4", b"<c8"), (b"(", b"(("), (b"True", b"print()"),
        (b"\x01\x00v", b"\x09\x00v"), (b"shape", b"shpae"),
    )  # fmt: skip
    old, new = chance.choice(swaps)
    if chance.random() < 0.5 and old in raw:
        return raw.replace(old, new, 1)
    head = raw[:128]
    return damage(head, chance) + raw[128:]


def targets(root: Path) -> list[Target]:
    """Every reader of foreign files; `root` is an empty folder to work in."""
    from fuzz_readers import readers

    return [Target(*reader) for reader in readers(root)]
