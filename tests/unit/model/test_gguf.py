"""A GGUF's vocabulary and tensors: hand-worked, and read back by the gguf package."""

from __future__ import annotations

import gc
import json
import re

import numpy as np
import pytest
from elsewhere_models import MAKERS

mx = pytest.importorskip("mlx.core")
gguf = pytest.importorskip("gguf")

from helpers import random_adapters  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from fpo_mlx.errors import ConfigError  # noqa: E402
from fpo_mlx.model import adapters, gguf_file, gguf_vocab  # noqa: E402
from fpo_mlx.model.fuse import fuse  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.records import FusedForm  # noqa: E402

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


LAYER = {  # Hugging Face's name within a block -> llama.cpp's, by its own documentation
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    },
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SHAPES = {  # kind -> (architecture, heads, head size, theta)
    "llama3": ("llama", 2, 32, 10000.0), "mistral": ("llama", 2, 64, 10000.0),
    "qwen2": ("qwen2", 2, 32, 40000.0), "qwen3": ("qwen3", 2, 32, 10000.0),
    "gemma2": ("gemma2", 2, 32, 10000.0), "gemma3": ("gemma3", 2, 32, 40000.0),
}  # fmt: skip


@pytest.fixture(scope="module", params=MAKERS)
def written(request, tmp_path_factory):
    """(kind, base, fused folder, reader of its GGUF) of a tiny model with random adapters."""
    root = tmp_path_factory.mktemp(request.param)
    base = with_adapter(root, request.param)
    form = FusedForm(dtype="float32", gguf_path="m.gguf")
    fuse(str(base), root / "adapter", root / "fused", form)
    return request.param, base, root / "fused", gguf.GGUFReader(root / "fused/m.gguf")


def with_adapter(root, kind):
    """A tiny model of that kind; random adapters for it lie beside."""
    base = MAKERS[kind](root / "base")
    model = load_model(base).model
    last = len(model.layers) - 1
    n, paths = adapters.adapted_paths(model, 2, last, ["self_attn.q_proj", "mlp.down_proj"])
    spec = adapters.AdapterSpec("lora", n, 4, 2.0, 0.0, paths)
    adapters.attach(model, spec)
    (root / "adapter").mkdir()
    values = {k: mx.array(v) for k, v in random_adapters(model).items()}
    adapters.save(root / "adapter/adapters.safetensors", values)
    (root / "adapter/adapter_config.json").write_text(json.dumps(spec.as_config("m")))
    return base


def test_weights_are_let_go_when_they_are_written_and_read_again_one_by_one(tmp_path, monkeypatch):
    """The whole float model stayed in memory while both files were written: 16 GB of one of 8B."""
    base, held = with_adapter(tmp_path, "llama3"), []
    write = gguf.GGUFWriter.write_tensor_data

    def noted(self, *words, **named):
        held.append(mx.get_active_memory())
        return write(self, *words, **named)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", noted)
    gc.collect()
    before = mx.get_active_memory()
    form = FusedForm(dtype="float32", gguf_path="m.gguf")
    fuse(str(base), tmp_path / "adapter", tmp_path / "fused", form)
    sizes = [value.nbytes for value in load_file(tmp_path / "fused/model.safetensors").values()]
    assert len(held) > len(sizes) / 2
    assert max(held) - before <= 2 * max(sizes) < sum(sizes) / 2


def _llama_cpps(name, gemma):
    path, kind = name.rpartition(".")[::2]
    if path in WHOLE:
        return f"{WHOLE[path]}.{kind}"
    block, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()
    return f"blk.{block}.{(LAYER | NORMS['gemma' if gemma else 'llama'])[inner]}.{kind}"


def test_every_tensor_of_the_fused_folder_stands_in_its_gguf_bit_for_bit(written):
    kind, _, fused, reader = written
    found = {t.name: np.array(t.data) for t in reader.tensors}
    _, heads, head_dim, _ = SHAPES[kind]
    groups = 1
    found.pop("rope_freqs.weight", None)
    for name, want in load_file(fused / "model.safetensors").items():
        got = found.pop(_llama_cpps(name, kind.startswith("gemma")))
        if kind.startswith("gemma") and "norm" in name:
            want = want + np.float32(1)  # mlx-lm adds it when it computes
        for part, n in (("q_proj", heads), ("k_proj", groups)):
            if part in name and SHAPES[kind][0] == "llama":
                got = np.stack(  # row 2 i + s of each head was row s half + i
                    [got[h * head_dim + (r % (head_dim // 2)) * 2 + r // (head_dim // 2)]
                     for h in range(n) for r in range(head_dim)]
                )  # fmt: skip
        assert got.dtype == want.dtype == np.float32
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert not found


def test_a_gguf_says_what_mlx_lm_computes_with(written):
    kind, base, _, reader = written
    arch, heads, head_dim, theta = SHAPES[kind]
    args = load_model(base).model.args

    def said(name):
        return reader.get_field(f"{arch}.{name}").contents()

    assert reader.get_field("general.architecture").contents() == arch
    assert said("attention.head_count") == heads
    assert said("attention.head_count_kv") == 1
    assert said("attention.key_length") == said("rope.dimension_count") == head_dim
    assert said("rope.freq_base") == args.rope_theta == theta
    assert said("attention.layer_norm_rms_epsilon") == pytest.approx(args.rms_norm_eps, rel=1e-6)


def test_a_ggufs_vocabulary_is_the_tokenizers(written):
    kind, base, _, reader = written
    whole = json.loads((base / "tokenizer.json").read_text())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    special = {t["id"]: t["content"] for t in whole["added_tokens"]}
    byid = {i: text for text, i in whole["model"]["vocab"].items()} | special

    def said(name):
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    tokens, types = said("tokens"), said("token_type")
    assert len(tokens) == len(types) == 320
    assert {i: tokens[i] for i in byid} == byid
    assert tokens[said("eos_token_id")] == settings["eos_token"]
    pieces = said("model") == "llama"
    assert pieces == (kind in ("mistral", "gemma2", "gemma3"))
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    for i, text in byid.items():
        want = 3 if i in special else 6 if pieces and re.fullmatch("<0x..>", text) else 1
        assert types[i] == (2 if text == "<unk>" else want), text
    assert all(types[i] == 5 for i in range(320) if i not in byid)
    if not pieces:
        assert said("merges") == merges
        return
    scores = said("scores")
    ranks = {m.replace(" ", ""): -rank for rank, m in reversed([*enumerate(merges, 1)])}
    normal = [i for i in byid if types[i] == 1]
    assert [scores[i] for i in normal if byid[i] in ranks] == [
        ranks[byid[i]] for i in normal if byid[i] in ranks
    ]
    unmade = {scores[i] for i in normal if byid[i] not in ranks}
    assert all(score < min(ranks.values()) for score in unmade)
    assert bool(said("add_space_prefix")) == (kind == "mistral")


def test_a_rotary_base_that_mlx_lm_does_not_read_is_refused(tmp_path):
    """transformers 5 writes it where mlx-lm's Llama does not look."""
    base = MAKERS["qwen2"](tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["rope_theta"]
    rope = {"rope_theta": 40000.0, "rope_type": "default"}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    loaded = load_model(base)
    with pytest.raises(ConfigError, match=r"theta 40000 .* mlx-lm computes with 1e\+06"):
        gguf_file.prepare(base, loaded.config, loaded.model.args, "float32")
