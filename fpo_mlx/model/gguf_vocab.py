"""A model folder's tokenizer as GGUF holds it: byte-level BPE and sentencepiece.

Token types are llama.cpp's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import TEMPLATE

MARK = "\u2581"  # sentencepiece's, in the place of a space
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# llama.cpp knows a pre-tokenizer by name; these are the regular expressions that each stands for
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"|\p{N}{1,3}" + _TAIL: "llama-bpe",
    _CONTRACTIONS + r"|\p{N}" + _TAIL: "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """One entry per token id, up to the model's rows. scores: sentencepiece's; merges: BPE's."""

    model: str  # "gpt2" | "llama"
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str]
    space_prefix: bool
    add_bos: bool
    add_eos: bool
    ids: Mapping[str, int]  # bos, eos, unk, pad
    template: str | None


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """rows: of the model's embedding. Raises: ConfigError naming what GGUF has no form for."""
    try:
        whole = files.parse_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        settings = files.parse_json((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model = whole["model"]
        if model["type"] != "BPE":
            raise _no(f"a {model['type']} tokenizer")
        level = "ByteLevel" in str(whole.get("pre_tokenizer"))
        return (_byte_level if level else _sentencepiece)(folder, whole, settings, rows)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _no(f"a tokenizer that cannot be read here ({error!r})") from error


def _no(what: str) -> ConfigError:
    return ConfigError(
        f"--export-gguf: found {what}, wanted byte-level BPE or sentencepiece as Llama, Qwen and "
        "Gemma have them. Fuse without it, and convert the folder with llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _byte_level(folder: Path, whole: Any, settings: Any, rows: int) -> Vocabulary:
    model = whole["model"]
    vocabulary = _by_id(model["vocab"], whole["added_tokens"], rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return _vocabulary(
        folder, whole, settings, model="gpt2", pre=_pre(whole["pre_tokenizer"], model),
        merges=merges, scores=None, space_prefix=False, vocabulary=vocabulary,
    )  # fmt: skip


def _pre(rule: Any, model: Any) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    parts = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    kinds = [part["type"] for part in parts]
    last = parts[-1]
    words = last.get("use_regex", True) and not last.get("add_prefix_space")
    if kinds == ["ByteLevel"] and words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and words:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        name = _SPLITS.get(parts[0]["pattern"].get("Regex", ""))
        whole_words = bool(model.get("ignore_merges"))  # llama.cpp has it for Llama 3 alone
        if name and whole_words != (name == "llama-bpe"):
            raise _no(f"{name}'s pre-tokenizer with ignore_merges {str(whole_words).lower()}")
        if name and parts[0].get("behavior") == "Isolated":
            return name
    raise _no(f"a pre-tokenizer that llama.cpp has no name for here ({', '.join(kinds)})")


def _sentencepiece(folder: Path, whole: Any, settings: Any, rows: int) -> Vocabulary:
    model = whole["model"]
    marks = _space_prefix(whole)
    if not model.get("byte_fallback") or marks is None:
        raise _no("a BPE tokenizer that is neither byte-level nor sentencepiece's")
    vocabulary = _by_id(model["vocab"], whole["added_tokens"], rows)
    pieces = folder / "tokenizer.model"
    known = dict(_pieces(pieces.read_bytes())) if pieces.is_file() else _ranks(model["merges"])
    tokens, types = vocabulary
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
        elif token == model.get("unk_token"):
            types[i] = UNKNOWN
    never = min(known.values(), default=0.0) - 1  # pieces that no merge makes
    scores = [
        known.get(t, never) if types[i] == NORMAL else -1000.0 if types[i] == USER else 0.0
        for i, t in enumerate(tokens)
    ]
    for i, kind in enumerate(types):
        if kind == USER:  # looked for before spaces become marks
            tokens[i] = tokens[i].replace(MARK, " ")
    return _vocabulary(
        folder, whole, settings, model="llama", pre="default", merges=(), scores=scores,
        space_prefix=marks, vocabulary=vocabulary,
    )  # fmt: skip


def _space_prefix(whole: Any) -> bool | None:
    """Whether a text gets a space before its first word; None where spaces become no marks."""
    if MARK in str(whole.get("normalizer")):
        return "Prepend" in str(whole["normalizer"])
    rule = whole.get("pre_tokenizer") or {}
    if rule.get("type") != "Metaspace" or rule.get("replacement") != MARK:
        return None
    if rule.get("split", True):
        raise _no("a Metaspace pre-tokenizer that splits at every space")
    return rule.get("prepend_scheme", "always") != "never"


def _ranks(merges: Sequence[Any]) -> dict[str, float]:
    """Scores that make sentencepiece merge in the order of BPE's list: the earlier, the higher."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault("".join(pair), -float(rank + 1))
    return found


def _pieces(data: bytes) -> Iterator[tuple[str, float]]:
    """(text, score) of each piece of a sentencepiece model: a protobuf's field 1."""
    for number, value in _fields(data):
        if number == 1:
            inner = dict(_fields(value))
            yield inner[1].decode("utf-8"), struct.unpack("<f", inner.get(2, bytes(4)))[0]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire) or varint()
        yield number, data[at : at + length]
        at += length


def _by_id(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Texts and types of all ids; rows of the model without a token are unused."""
    beyond = {token["content"] for token in added if token["id"] >= rows}
    own = {text: i for text, i in vocabulary.items() if text not in beyond}
    if (highest := max(own.values())) >= rows:
        raise _no(f"token ids up to {highest} with an embedding of {rows} rows")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, i in own.items():
        tokens[i], types[i] = text, NORMAL
    for token in added:
        if token["content"] in beyond:  # Gemma 3's <image_soft_token>: a text model has no row
            continue
        i = token["id"]
        tokens[i], types[i] = token["content"], CONTROL if token.get("special") else USER
    return tokens, types


def _special_ids(folder: Path, settings: Any, tokens: Sequence[str]) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, from the first file that names each.

    Raises: ConfigError without an eos: nothing would end an answer.
    """
    others = ("special_tokens_map", "generation_config", "config")
    places = [settings, *(_object(folder / f"{name}.json") for name in others)]
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        for place in places:
            token = place.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            number = place.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if text in tokens:
                ids[name] = tokens.index(text)
            elif isinstance(number, int) and 0 <= number < len(tokens):
                ids[name] = number
            if name in ids:
                break
    if "eos" not in ids:
        raise _no("a tokenizer without an end-of-text token (eos_token)")
    return ids


def _object(path: Path) -> dict[str, Any]:
    found = files.parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _vocabulary(
    folder: Path,
    whole: Any,
    settings: Any,
    *,
    vocabulary: tuple[list[str], list[int]],
    **parts: Any,
) -> Vocabulary:
    tokens, types = vocabulary
    ids = _special_ids(folder, settings, tokens)
    template = folder / TEMPLATE
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    added_by_default = settings.get("add_bos_token")
    if added_by_default is None:  # a fast tokenizer has it in its post-processor
        special = f"{{'id': {tokens[ids['bos']]!r}" if "bos" in ids else None
        added_by_default = bool(special) and special in str(whole.get("post_processor"))
    return Vocabulary(
        tokens=tokens, types=types, ids=ids, add_bos=bool(added_by_default),
        add_eos=bool(settings.get("add_eos_token")),
        template=text or settings.get("chat_template"), **parts,
    )  # fmt: skip
