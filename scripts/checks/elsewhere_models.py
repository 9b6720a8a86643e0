"""Tiny random models like Llama 3, Mistral, Qwen 2 and 3, Gemma 2 and 3, with such tokenizers.

Their config.json is written as the hub's are (rope_theta, rope_scaling), which both transformers 4
and 5 read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/support"))

import tiny_models  # noqa: E402
from tiny_tokenizer import CHATML, LINES, build_tiny_tokenizer  # noqa: E402

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 320,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def split_tokenizer(folder: Path, digits: str) -> None:
    """Byte-level BPE behind the regular expression of Llama 3 ({1,3}) or Qwen 2 ("")."""
    build_tiny_tokenizer(folder, CHATML)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    rule = {"Regex": LETTERS + r"|\p{N}" + digits + TAIL}
    whole["model"]["ignore_merges"] = digits == "{1,3}"  # as Llama 3 has it, and Qwen not
    whole["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": rule, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ],
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    place = folder / "tokenizer_config.json"
    config = json.loads(place.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes another name
    place.write_text(json.dumps(config))


def piece_tokenizer(folder: Path, prefix: bool = False) -> None:
    """Sentencepiece as Gemma's tokenizer.json has it: byte fallback, no space put in front.

    prefix: with a space in front, as Llama 2 and Mistral have it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), marks]) if prefix else marks
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    trainer = trainers.BpeTrainer(
        vocab_size=318, special_tokens=[*special, *pieces], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] in special]
    for i, piece in enumerate(pieces):
        whole["model"]["vocab"][piece] = len(special) + i
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _as_on_the_hub(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10000.0, "torch_dtype": "float32", **settings}
    path.write_text(json.dumps(config))
    return folder


def llama3(folder: Path) -> Path:
    rope = {**LLAMA3_ROPE, "rope_theta": 10000.0}
    tiny_models.tiny_llama(folder, tokenizer=True, **SIZE, rope_parameters=rope)
    split_tokenizer(folder, "{1,3}")
    return _as_on_the_hub(folder, rope_scaling=LLAMA3_ROPE)


def qwen3(folder: Path) -> Path:
    tiny_models.tiny_qwen3(folder, tokenizer=True, **SIZE)
    split_tokenizer(folder, "")
    return _as_on_the_hub(folder)


def qwen2(folder: Path) -> Path:
    tiny_models.tiny_qwen2(folder, tokenizer=True, **SIZE)
    split_tokenizer(folder, "")
    return _as_on_the_hub(folder, rope_theta=40000.0)


def mistral(folder: Path) -> Path:
    """Heads larger than hidden / heads, as Mistral Nemo has them."""
    tiny_models.tiny_mistral(folder, tokenizer=True, **SIZE | {"head_dim": 64})
    piece_tokenizer(folder, prefix=True)
    return _as_on_the_hub(folder)


def gemma2(folder: Path) -> Path:
    tiny_models.tiny_gemma2(folder, tokenizer=True, **SIZE, query_pre_attn_scalar=32)
    piece_tokenizer(folder)
    return _as_on_the_hub(folder)


def gemma3(folder: Path) -> Path:
    """Seven blocks, of which the sixth sees all."""
    kinds = ["full_attention" if block == 5 else "sliding_attention" for block in range(7)]
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 40000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    tiny_models.tiny_gemma3_text(
        folder, tokenizer=True, **SIZE, query_pre_attn_scalar=32, num_hidden_layers=7,
        layer_types=kinds, rope_parameters=rope,
    )  # fmt: skip
    piece_tokenizer(folder)
    return _as_on_the_hub(folder, rope_theta=40000.0, sliding_window_pattern=6)


MAKERS = {
    "llama3": llama3, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma2": gemma2,
    "gemma3": gemma3,
}  # fmt: skip
