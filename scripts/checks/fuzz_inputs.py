"""What fuzz.py feeds: ways to spoil an input, valid inputs of every kind, and who reads them."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
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


# The readers --------------------------------------------------------------------------------------

Call = Callable[[], Any]
ASK = {"role": "user", "content": "Q?"}
TELL, ERR = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
ROWS: tuple[Any, ...] = (
    {"prompt": "Q?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."},
    {"prompt": [ASK], "chosen": [TELL], "rejected": [ERR], "tools": [{"type": "function"}]},
    {"chosen": [ASK, TELL, ASK, TELL], "rejected": [ASK, TELL, ASK, ERR]},
    {"chosen": "\n\nHuman: Q?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Q?\n\nAssistant: No."},
    {"prompt": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "4", "tool_call_id": "1"}],
     "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
     "rejected": [ERR]},
)  # fmt: skip
ANSWER = {"text": "Yes.", "tokens": 2, "finish": "stop", "logp": -1.5, "seed": 0, "temp": 1.0,
          "model": "m"}  # fmt: skip
CANDIDATES: tuple[Any, ...] = (
    {"id": "00ff", "prompt": "Q?", "candidates": [ANSWER, ANSWER | {"text": "No."}]},
    {"id": "1", "prompt": [ASK, TELL, ASK], "tools": [{"type": "function"}],
     "candidates": [ANSWER, ANSWER | {"text": "b", "finish": "length", "model": "human"}]},
)  # fmt: skip
VERDICTS: tuple[Any, ...] = (
    {"id": "1", "a": 0, "b": 1, "order": "ab", "verdict": "a", "p": 0.9, "score_a": None,
     "score_b": None, "judge": "j", "raw": "A", "time": 1.0},
    {"id": "1", "a": 1, "b": 0, "order": "ba", "verdict": "b", "p": 0.2, "judge": "j"},
    {"id": "1", "a": 0, "b": 1, "order": "ab", "verdict": "both_bad", "judge": "person",
     "edited": "Perhaps.", "time": 2.0},
    {"id": "1", "a": 0, "b": 1, "order": "none", "verdict": "tie", "judge": "reward:r", "p": None,
     "score_a": 1.0, "score_b": 1.0},
)  # fmt: skip
SETTINGS = {
    "model": "m", "sae": ["a", "b"], "layer": 3, "data": "d", "objective": "fpo", "alpha": 0.5,
    "beta": 0.1, "top_k": 50, "lora_parameters": {"rank": 8, "scale": 20.0, "keys": ["q"]},
    "batch_size": 4, "epochs": 1, "learning_rate": 2e-5, "max_grad_norm": None,
    "optimizer_config": {"adamw": {"weight_decay": 0.01}}, "grad_checkpoint": False,
    "lr_schedule": {"name": "cosine_decay", "arguments": [2e-5, 500], "warmup": 20},
}  # fmt: skip
ADAPTER = {
    "fine_tune_type": "lora", "num_layers": 2, "model": "m",
    "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader. make: a spoiled input -> what to call (a fresh closure each time)."""

    name: str
    share: int  # of the inputs, in relation to the others
    make: Callable[[random.Random], Call]


def targets(root: Path) -> Iterator[Target]:
    """Every reader of foreign files; `root` is an empty folder to work in."""
    yield Target("rows", 40, rows(root))
    yield Target("candidate lines", 10, candidate_lines(root))
    yield Target("verdict lines", 10, verdict_lines(root))
    yield Target("YAML settings", 10, yaml_settings(root))
    yield from cache_readers(root / "cache")
    yield from sae_readers(root / "sae")
    yield from run_readers(root / "run")


def rows(root: Path) -> Callable[[random.Random], Call]:
    """A line of JSON Lines through decoder, parser and the data check."""
    from fpo_mlx.data.check import check_data
    from fpo_mlx.data.containers import RawRow, decode
    from fpo_mlx.data.read import parse_rows

    def make(chance: random.Random) -> Call:
        record, fault = decode(json_bytes(chance.choice(ROWS), chance))
        raw = [RawRow(record, "train.jsonl:1", 0, fault)]
        if chance.random() < 0.2:
            return lambda: json.dumps(check_data({"train": raw}).as_dict())
        return lambda: parse_rows(raw, "train.jsonl")

    return make


def candidate_lines(root: Path) -> Callable[[random.Random], Call]:
    """A file of one spoiled line of candidates, read and asked for what `rate` and `build` ask."""
    from fpo_mlx.pairs.choose import Left, pairs_of
    from fpo_mlx.pairs.labels import Label, comparisons
    from fpo_mlx.pairs.records import open_candidates
    from fpo_mlx.pairs.settings import BuildConfig

    path = root / "candidates.jsonl"

    def read() -> None:
        for one in open_candidates(path):
            pairs = comparisons(one, neighbours=False, human=None, against_reference=False)
            labels = [Label(a, b, "a") for a, b in pairs]
            for pair in pairs_of(one, labels, BuildConfig(), Left()):
                json.dumps(pair.row())

    def make(chance: random.Random) -> Call:
        path.write_bytes(json_bytes(chance.choice(CANDIDATES), chance) + b"\n")
        return read

    return make


def verdict_lines(root: Path) -> Callable[[random.Random], Call]:
    from fpo_mlx.pairs.labels import by_prompt, labels_of
    from fpo_mlx.pairs.records import read_verdicts
    from fpo_mlx.pairs.summary import self_agreement, summarise

    path = root / "verdicts.jsonl"

    def read() -> None:
        found = list(read_verdicts(path).values())
        for group in by_prompt(found).values():
            labels_of(group)
        self_agreement(found)
        json.dumps([s.as_dict() for s in summarise(found, lambda _: [1] * 64, found).values()])

    def make(chance: random.Random) -> Call:
        lines = [json_bytes(chance.choice(VERDICTS), chance) for _ in range(chance.choice((1, 2)))]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return read

    return make


def yaml_settings(root: Path) -> Callable[[random.Random], Call]:
    import yaml

    from fpo_mlx.config import load_config

    path = root / "run.yaml"
    hostile = (
        b"model: !!python/object/apply:os.system ['true']\n", b"a: &a [*a]\n", b"a: &a {b: *a}\n",
        b"x: " + b"[" * 3000, b"? [a, b]\n: c\n", b"model: 2020-13-45\n", b"alpha: .inf\n",
        b"seed: 0x" + b"f" * 2000 + b"\n", b"<<: [1]\n", b"model: !!binary x\n", b"seed: 1:99:99\n",
        b"alpha: " + b"9" * 5000, b"beta: 12345678901234567890e999\n", b"- a\n", b"--- a\n--- b\n",
    )  # fmt: skip

    def make(chance: random.Random) -> Call:
        if chance.random() < 0.1:
            data = chance.choice(hostile)
        else:
            plain = json.loads(json.dumps(spoil(SETTINGS, chance, chance.choice((1, 2, 3)))))
            data = yaml.safe_dump(plain).encode("utf-8", "surrogatepass")
        data = damage(data, chance) if chance.random() < 0.3 else data
        path.write_bytes(data)
        return lambda: use_settings(load_config({}, path))

    return make


def use_settings(config: Any) -> None:
    """What a run does with them at once."""
    json.dumps(config.as_dict())
    _ = config.train.lora
    config.train.iterations(100)


def cache_readers(folder: Path) -> Iterator[Target]:
    from fpo_mlx import cache
    from fpo_mlx.records import ResponseScore, SparseFeatures

    identity = cache.CacheIdentity("m", "t", saes=(("s", "resid_post of block 1"),))
    store = cache.open_cache(folder, identity, create=True)
    pooled = SparseFeatures(np.array([1, 5], np.int32), np.array([0.5, 2.0], np.float32))
    store.append([(bytes([n] * 16), ResponseScore(-2.0, 3, (pooled,))) for n in range(4)])
    manifest, shard = folder / "manifest.json", folder / "rows-00000.safetensors"
    good, rows_good = manifest.read_bytes(), shard.read_bytes()

    def read() -> None:
        found = cache.open_cache(folder, cache.read_identity(folder))
        for key in found.keys():  # noqa: SIM118
            found.get(key)
        cache.info(folder)

    def of_manifest(chance: random.Random) -> Call:
        shard.write_bytes(rows_good)
        manifest.write_bytes(json_bytes(json.loads(good), chance))
        return read

    def of_shard(chance: random.Random) -> Call:
        manifest.write_bytes(good)
        shard.write_bytes(safetensors_bytes(rows_good, chance))
        return read

    yield Target("cache manifest", 10, of_manifest)
    yield Target("cache shard", 8, of_shard)


def sae_readers(root: Path) -> Iterator[Target]:
    from tiny_saes import CASES

    made = []
    for number, case in enumerate(CASES):
        kept = case.make(root / f"{number}", np.random.default_rng(1))
        files = {p: p.read_bytes() for p in (root / f"{number}").rglob("*") if p.is_file()}
        made.append((kept, files, case.pickled))

    def of(*suffixes: str, spoiled: Callable[[Path, bytes, random.Random], bytes]):
        fit = [m for m in made if any(p.name.endswith(suffixes) for p in m[1])]

        def make(chance: random.Random) -> Call:
            from fpo_mlx.sae import load_sae

            kept, files, pickled = chance.choice(fit)
            path = chance.choice([p for p in files if p.name.endswith(suffixes)])
            for other, data in files.items():
                other.write_bytes(data)
            path.write_bytes(spoiled(path, files[path], chance))
            return lambda: load_sae(kept.path, allow_pickle=pickled, **kept.options)

        return make

    yield Target("SAE safetensors", 7, of(".safetensors",
           spoiled=lambda p, data, chance: safetensors_bytes(data, chance)))  # fmt: skip
    yield Target("SAE npz", 6, of(".npz", spoiled=_spoiled_npz))
    yield Target("SAE configuration", 9, of(".json", spoiled=_spoiled_json))
    yield Target("SAE torch pickle", 8, of(".pt", ".pth", spoiled=_spoiled_pickle))


def _spoiled_npz(path: Path, data: bytes, chance: random.Random) -> bytes:
    with np.load(path) as archive:
        return npz_bytes(dict(archive), chance)


def _spoiled_json(path: Path, data: bytes, chance: random.Random) -> bytes:
    return json_bytes(json.loads(data), chance)


def _spoiled_pickle(path: Path, data: bytes, chance: random.Random) -> bytes:
    """Another description of the same tensors, in a sound archive; or damage anywhere."""
    if chance.random() < 0.2:
        return damage(data, chance)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice([n for n in parts if n.endswith(".pkl")] * 4 + list(parts))
    parts[name] = damage(parts[name], chance)
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in parts.items():
            archive.writestr(entry, content)
    return path.read_bytes()


def run_readers(folder: Path) -> Iterator[Target]:
    """Adapters, checkpoints and model folders."""
    import mlx.core as mx

    from fpo_mlx.errors import ModelError
    from fpo_mlx.model import adapters
    from fpo_mlx.reference import weights
    from fpo_mlx.storage.hub import read_config
    from fpo_mlx.train.checkpoint import STATE, check_resumable

    folder.mkdir(parents=True)
    model = _tiny_model()
    config, arrays = folder / adapters.CONFIG, folder / adapters.WEIGHTS
    config.write_text(json.dumps(ADAPTER))
    mx.save_safetensors(str(arrays), {"a.lora_a": mx.zeros((4, 3)), "a.lora_b": mx.zeros((3, 4))})
    sound = arrays.read_bytes()
    run = {
        "settings": {"seed": 1, "top_k": 5},
        "fingerprints": {"model": "m", "saes": [["a", "b"]]},
    }
    (folder / STATE).parent.mkdir()
    shutil.copy(arrays, folder / STATE)
    model_config = {"model_type": "llama", "hidden_size": 8, "text_config": {"hidden_size": 9}}

    def of_adapter(chance: random.Random) -> Call:
        config.write_bytes(json_bytes(ADAPTER, chance))
        return lambda: adapters.read_spec(folder, model)

    def of_weights(chance: random.Random) -> Call:
        arrays.write_bytes(safetensors_bytes(sound, chance))
        config.write_text(json.dumps(ADAPTER))

        def read() -> None:
            weights.adapter_fingerprint(folder)
            try:
                adapters.fill(model, arrays)
            except ModelError as error:
                if "does not fit the model" not in str(error):
                    raise

        return read

    def of_run(chance: random.Random) -> Call:
        (folder / "run.json").write_bytes(json_bytes(run, chance))
        return lambda: check_resumable(folder, run)

    def of_model(chance: random.Random) -> Call:
        (folder / "config.json").write_bytes(json_bytes(model_config, chance))
        return lambda: read_config(folder)

    yield Target("adapter_config.json", 8, of_adapter)
    yield Target("adapter weights", 4, of_weights)
    yield Target("run.json", 5, of_run)
    yield Target("model config.json", 3, of_model)


def _tiny_model() -> Any:
    from mlx_lm.models import llama

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": 20}
    return llama.Model(
        llama.ModelArgs("llama", num_attention_heads=2, rms_norm_eps=1e-5, **sizes)  # type: ignore
    )
