"""A GGUF's vocabulary and tensors: hand-worked, and read back by the gguf package."""

from __future__ import annotations

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
gguf = pytest.importorskip("gguf")

from fpo_mlx.errors import ConfigError  # noqa: E402
from fpo_mlx.model import gguf_file, gguf_vocab  # noqa: E402

LLAMA3 = next(text for text, name in gguf_vocab._SPLITS.items() if name == "llama-bpe")


def test_pairs_of_one_rotation_stand_beside_each_other():
    rows = np.arange(8.0)[:, None]  # two heads of four: halves 0 1 | 2 3 and 4 5 | 6 7
    assert gguf_file.interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_long_waves_are_divided_by_the_factor_and_short_ones_are_left():
    rope = {
        "kind": "llama3", "theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 100,
    }  # fmt: skip
    factors = gguf_file.rope_factors(rope, 4)  # waves of 2 pi and 200 pi positions
    assert factors is not None
    assert factors.tolist() == [1.0, 8.0]


def test_added_tokens_beyond_the_rows_are_left_out_and_others_are_refused():
    image = {"id": 3, "content": "<image>", "special": True}
    tokens, types = gguf_vocab._by_id({"a": 0, "b": 1, "<image>": 3}, [image], 3)
    assert (tokens, types) == (["a", "b", "[PAD2]"], [1, 1, 5])
    with pytest.raises(ConfigError, match="token ids up to 3 with an embedding of 3 rows"):
        gguf_vocab._by_id({"a": 0, "b": 3}, [], 3)


def test_earlier_merges_score_higher():
    assert gguf_vocab._ranks(["a b", ["ab", "c"], "a b"]) == {"ab": -1.0, "abc": -2.0}


def test_pieces_are_read_from_a_sentencepiece_model():
    piece = b"\x0a\x01a" + b"\x15" + np.float32(-2.5).tobytes()
    data = b"\x0a" + bytes([len(piece)]) + piece
    assert list(gguf_vocab._pieces(data)) == [("a", -2.5)]


LEVEL = {"type": "ByteLevel", "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"}
DIGITS = {"type": "Digits", "individual_digits": True}


def _sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def test_a_pre_tokenizer_has_llama_cpps_name_only_where_all_of_it_fits():
    words = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    assert gguf_vocab._pre(words, {}) == "gpt-2"
    assert gguf_vocab._pre(_sequence(DIGITS, words), {}) == "smollm"
    assert gguf_vocab._pre(_sequence(SPLIT, LEVEL), {"ignore_merges": True}) == "llama-bpe"
    wrong = [
        (_sequence(SPLIT, LEVEL), {"ignore_merges": False}),
        (_sequence(DIGITS, LEVEL), {}),
        (_sequence(DIGITS, words | {"add_prefix_space": True}), {}),
    ]
    for rule, model in wrong:
        with pytest.raises(ConfigError, match="--export-gguf"):
            gguf_vocab._pre(rule, model)


def test_the_end_of_text_is_looked_for_in_every_file_and_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="eos_token"):
        gguf_vocab._special_ids(tmp_path, {}, ["a", "</s>"])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert gguf_vocab._special_ids(tmp_path, {}, ["a", "</s>"]) == {"eos": 0}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert gguf_vocab._special_ids(tmp_path, {}, ["a", "</s>"]) == {"eos": 1}


def test_metaspace_says_whether_a_text_begins_with_a_space():
    rule = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    for scheme, prefix in (("first", True), ("always", True), ("never", False)):
        assert gguf_vocab._space_prefix({"pre_tokenizer": rule | {"prepend_scheme": scheme}}) is (
            prefix
        )
    with pytest.raises(ConfigError, match="Metaspace pre-tokenizer that splits"):
        gguf_vocab._space_prefix({"pre_tokenizer": rule | {"split": True}})


def test_sliding_layers_outside_gemma_are_refused():
    config = {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ConfigError, match="layers of sliding attention"):
        gguf_file._check(config, 8, {"kind": "default"})


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_file_that_was_written_reads_back(tmp_path, kind):
    vocabulary = gguf_vocab.Vocabulary(
        model="gpt2", pre="gpt-2", tokens=["a", "b"], types=[1, 3], scores=None, merges=["a b"],
        space_prefix=False, add_bos=False, add_eos=False, ids={"eos": 1}, template=None,
    )  # fmt: skip
    config = {
        "num_hidden_layers": 1, "max_position_embeddings": 8, "hidden_size": 4,
        "intermediate_size": 4, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    export = gguf_file.Export(
        "qwen2", kind, config, vocabulary, (1, 1), 4, {"kind": "default", "theta": 10000.0}
    )
    rng = np.random.default_rng(0)
    wanted = {
        "model.embed_tokens.weight": rng.integers(-8, 8, (2, 4)),
        "model.layers.0.self_attn.q_proj.weight": rng.integers(-8, 8, (4, 4)),
        "model.norm.weight": rng.integers(-8, 8, 4),
    }
    weights = {name: mx.array(value.astype(np.float32)) for name, value in wanted.items()}
    gguf_file.write(tmp_path / "a.gguf", export, weights, tmp_path)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {t.name: t for t in reader.tensors}
    names = gguf_file.their_names(export, wanted)
    assert set(found) == set(names.values())
    for name, theirs in names.items():
        tensor = found[theirs]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values.reshape(wanted[name].shape), wanted[name])
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 1
