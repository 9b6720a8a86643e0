"""The torch backend against the float64 oracle, and its reading of MLX folders and adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import oracle
import safetensors.torch
import tiny_models
import torch
from tiny_make import for_transformers

from fpo_mlx.errors import ConfigError, FpoError, ModelError, SaeError
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site, TokenPair
from fpo_mlx.reference import open_backend
from fpo_mlx.reference.torch_backend import TorchBackend, mlx_folder, passes
from fpo_mlx.reference.torch_backend.load import add_adapter
from fpo_mlx.reference.torch_backend.saes import encode, on_device

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FEATURES = 40


def make_sae(
    site: Site, width: int, activation: str = "relu", seed: int = 0, **extra
) -> SaeWeights:
    rng = np.random.default_rng(seed)

    def random(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    own = {
        "jumprelu": {"threshold": np.abs(random(FEATURES, scale=0.5))},
        "gated": {
            "gate_scale": np.exp(random(FEATURES, scale=0.2)),
            "gate_bias": random(FEATURES),
        },
        "topk": {"k": 5},
        "abstopk": {"k": 5},
        "groupmax": {"k": 8},
    }.get(activation, {})
    w_enc = random(width, FEATURES, scale=width**-0.5)
    settings = {"b_in": random(width, scale=0.1), "b_enc": random(FEATURES, scale=0.1)}
    return SaeWeights(activation, w_enc, site=site, **(settings | own | extra))


def make_pairs(n: int = 5, seed: int = 0, longest: int = 14) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(n):
        sizes = rng.integers(1, longest, size=3)
        ids = [rng.integers(3, tiny_models.VOCAB, size).astype(np.int32) for size in sizes]
        pairs.append(TokenPair(*ids, index=index))
    return pairs


def width_of(model, kind: str) -> int:
    config = model.config.get_text_config()
    if kind == "attn_z":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return head * config.num_attention_heads
    return config.hidden_size


def assert_scores_are_the_oracle_s(model, saes, pairs, scores) -> None:
    for pair, pair_scores in zip(pairs, scores, strict=True):
        for response, got in zip(pair.responses, pair_scores, strict=True):
            want = oracle.score_response(model, pair.prompt, response, saes)
            assert got.tokens == len(response)
            assert got.logps == pytest.approx(float(want.logps), rel=2e-5)
            for pooled, wanted in zip(got.features, want.pooled, strict=True):
                dense, wanted = pooled.to_dense(len(wanted)), wanted.numpy()
                np.testing.assert_allclose(dense, wanted, rtol=0, atol=2e-5 * abs(wanted).max())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny model, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.MAKERS[family](tmp_path_factory.mktemp(family))
        return for_transformers(made[family])

    return get


@pytest.fixture(scope="module")
def llama(folder_of) -> Path:
    return folder_of("llama")


@pytest.mark.parametrize("family", tiny_models.MAKERS)
def test_scores_are_those_of_a_slow_float64_loop(family, folder_of):
    folder = folder_of(family)
    model, pairs = oracle.load_oracle(folder), make_pairs(4)
    saes = [make_sae(Site(2), width_of(model, "resid_post"))]
    backend = TorchBackend(folder, saes=saes, device="cpu")
    assert backend.dtype == "float32"
    assert_scores_are_the_oracle_s(model, saes, pairs, backend.score(pairs))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite", "gpt2", "cohere2"])
@pytest.mark.parametrize("kind", SITE_KINDS)
def test_every_site_is_read_where_the_oracle_reads_it(family, kind, folder_of):
    folder = folder_of(family)
    model, pairs = oracle.load_oracle(folder), make_pairs(2)
    saes = [make_sae(Site(1, kind), width_of(model, kind))]
    if kind == "mlp_in_unscaled" and family in ("olmo2", "gpt2", "cohere2"):
        with pytest.raises(SaeError, match="cannot be read"):
            TorchBackend(folder, saes=saes, device="cpu")
        return
    backend = TorchBackend(folder, saes=saes, device="cpu")
    assert_scores_are_the_oracle_s(model, saes, pairs, backend.score(pairs))


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize(
    "activation", ["relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "identity"]
)
def test_every_kind_of_sae_encodes_as_its_formula(activation, normalize):
    scale = np.linspace(0.5, 2, FEATURES).astype(np.float32)
    sae = make_sae(Site(0), 16, activation, normalize=normalize, act_scale=scale)
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    got = encode(on_device(sae, torch.device("cpu")), x).double()
    want = oracle.encode(sae, x.double())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert int((want != 0).sum()) > 30


def test_several_saes_are_scored_in_their_order(llama):
    saes = [
        make_sae(Site(2, "mlp_out"), 32, "topk", seed=1),
        make_sae(Site(0), 32, "jumprelu", seed=2),
        make_sae(Site(2, "mlp_out"), 32, "gated", seed=3),
    ]
    pairs = make_pairs(3)
    scores = TorchBackend(llama, saes=saes, device="cpu").score(pairs)
    assert_scores_are_the_oracle_s(oracle.load_oracle(llama), saes, pairs, scores)


def test_without_an_sae_a_score_is_its_log_prob(llama):
    pairs = make_pairs(3)
    scores = TorchBackend(llama, device="cpu").score(pairs)
    assert all(score.features == () for pair in scores for score in pair)
    assert_scores_are_the_oracle_s(oracle.load_oracle(llama), [], pairs, scores)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_a_score_does_not_depend_on_its_batch(family, folder_of):
    folder = folder_of(family)
    width = 64 if family.startswith("gemma3") else 32
    backend = TorchBackend(folder, saes=[make_sae(Site(2), width)], device="cpu")
    pairs = make_pairs(6, longest=20)
    together = backend.score(pairs)
    backend.tokens_per_batch = 1  # every response alone: no padding at all
    alone = backend.score(pairs)
    for a, b in zip(np.ravel(together), np.ravel(alone), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=1e-5)
        x, y = a.features[0].to_dense(FEATURES), b.features[0].to_dense(FEATURES)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * abs(x).max())


def test_a_response_of_one_token_and_a_prompt_of_one_token_are_scored(llama):
    one = np.array([7], np.int32)
    pairs = [TokenPair(one, one + 1, one + 2, index=0)]
    saes = [make_sae(Site(3), 32)]
    scores = TorchBackend(llama, saes=saes, device="cpu").score(pairs)
    assert_scores_are_the_oracle_s(oracle.load_oracle(llama), saes, pairs, scores)


def test_chunks_of_the_head_and_of_the_encoder_change_nothing(llama, monkeypatch):
    from fpo_mlx.reference import torch_backend

    pairs, saes = make_pairs(4), [make_sae(Site(2), 32)]
    backend = TorchBackend(llama, saes=saes, device="cpu")
    monkeypatch.setattr(torch_backend.head, "HEAD_ELEMENTS", 3 * tiny_models.VOCAB)
    monkeypatch.setattr(torch_backend.saes, "CHUNK_ELEMENTS", 2 * FEATURES)
    model = oracle.load_oracle(llama)
    assert_scores_are_the_oracle_s(model, saes, pairs, backend.score(pairs))


def test_running_out_of_memory_halves_the_batch_and_loses_nothing(llama, monkeypatch):
    pairs, saes = make_pairs(6), [make_sae(Site(2), 32)]
    backend = TorchBackend(llama, saes=saes, device="cpu", share_prompt=False)
    want, sizes = backend.score(pairs), []
    real = backend._score

    def small(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(batch)

    monkeypatch.setattr(backend, "_score", small)
    got = backend.score(pairs)
    assert sizes[:3] == [12, 6, 3]
    assert all(size <= 12 // 2 for size in sizes[1:])
    for a, b in zip(np.ravel(got), np.ravel(want), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=1e-5)


# blocks with a window, or with a recurrent state
WINDOWED = {"gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "cohere2", "gpt_oss"}
WINDOWED |= {"qwen3_next"}


def long_prompts(n: int, seed: int = 0) -> list[TokenPair]:
    """Prompts of many lengths, so long that to run them once pays."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(20, 40)), *rng.integers(1, 9, size=2)) for _ in range(n)]
    draw = [
        [rng.integers(3, tiny_models.VOCAB, s).astype(np.int32) for s in size] for size in sizes
    ]
    return [TokenPair(*ids, index=i) for i, ids in enumerate(draw)]


def assert_close(got, want, tolerance: float = 1e-5) -> None:
    for a, b in zip(np.ravel(got), np.ravel(want), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=tolerance)
        for x, y in zip(a.features, b.features, strict=True):
            x, y = x.to_dense(FEATURES), y.to_dense(FEATURES)
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * abs(y).max())


@pytest.mark.parametrize("family", tiny_models.MAKERS)
def test_a_prompt_that_runs_once_gives_the_scores_of_one_that_runs_twice(family, folder_of):
    folder, width = folder_of(family), 64 if family.startswith("gemma3") else 32
    pairs, saes = [*long_prompts(5), *make_pairs(3)], [make_sae(Site(2), width)]
    once = TorchBackend(folder, saes=saes, device="cpu")
    assert once.shares_prompt == (family not in WINDOWED)
    twice = TorchBackend(folder, saes=saes, device="cpu", share_prompt=False)
    tolerance = 1e-4 if family == "qwen3_next" else 1e-5  # its recurrence adds up more rounding
    assert_close(once.score(pairs), twice.score(pairs), tolerance)
    once.tokens_per_batch = 150  # a few pairs a batch
    assert_close(once.score(pairs), twice.score(pairs), tolerance)


def test_a_shared_prompt_is_shared_where_it_pays_and_counted_with_its_padding():
    one = np.array([5], np.int32)
    even = TokenPair(one.repeat(11), one.repeat(10), one.repeat(10), index=0)  # 10 + 20 against 40
    lopsided = TokenPair(one.repeat(2), one.repeat(3), one.repeat(90), index=1)
    assert [len(unit) for unit in passes.units([even, lopsided], share=True)] == [1, 1, 2]
    assert passes.width(passes.units([even], share=True)) == 10 + 2 * 10
    assert [len(unit) for unit in passes.units([even], share=False)] == [1, 1]
    todo = passes.units([even, even, even, lopsided], share=True)
    assert len(passes.next_batch(todo[2:], 60)) == 2
    assert len(passes.next_batch(todo[2:], 89)) == 2
    assert len(passes.next_batch(todo[2:], 90)) == 3
    assert len(passes.next_batch(todo, 1)) == 1


def test_where_memory_holds_no_pair_its_responses_are_scored_one_by_one(llama, monkeypatch):
    pairs, saes = long_prompts(6), [make_sae(Site(2), 32)]
    backend = TorchBackend(llama, saes=saes, device="cpu")
    want, seen = backend.score(pairs), []
    real = backend._score

    def small(batch):
        seen.append((len(batch), len(batch[0])))
        if len(batch[0]) == 2 and (len(batch) > 2 or batch[0][0].number in (0, 4)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(batch)

    monkeypatch.setattr(backend, "_score", small)
    assert_close(backend.score(pairs), want)
    assert seen[0] == (6, 2)
    assert (1, 2) in seen
    assert (1, 1) in seen or (2, 1) in seen


def test_a_response_that_no_memory_holds_is_an_error_with_advice(llama, monkeypatch):
    backend = TorchBackend(llama, device="cpu")

    def never(batch):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")

    monkeypatch.setattr(backend, "_score", never)
    with pytest.raises(ModelError, match=r"single response of \d+ tokens.*--max-seq-length"):
        backend.score(make_pairs(3))


def test_another_runtime_error_is_not_taken_for_want_of_memory(llama, monkeypatch):
    backend = TorchBackend(llama, device="cpu")
    monkeypatch.setattr(backend, "_score", lambda batch: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        backend.score(make_pairs(1))


def test_half_precision_weights_are_near_the_float32_scores(llama):
    pairs, saes = make_pairs(4), [make_sae(Site(2), 32)]
    half = TorchBackend(llama, saes=saes, device="cpu", dtype="bfloat16")
    assert half.dtype == "bfloat16"
    exact = TorchBackend(llama, saes=saes, device="cpu").score(pairs)
    for a, b in zip(np.ravel(half.score(pairs)), np.ravel(exact), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=0.05)
        assert a.features[0].values.dtype == np.float32
        assert a.logps != b.logps


# MLX folders --------------------------------------------------------------------------------------


def save_with_mlx(source: Path, target: Path, **quantise) -> Path:
    """What mlx_lm.convert writes, quantised if settings are given."""
    pytest.importorskip("mlx_lm")
    from mlx_lm import utils

    model, config = utils.load_model(source)
    if quantise:
        settings = {"mode": "affine", "quant_predicate": None} | quantise
        model, config = utils.quantize_model(model, config, **settings)
    utils.save_model(target, model)
    utils.save_config(config, config_path=target / "config.json")
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", mlx_folder.BITS)
def test_dequantising_equals_mlx_s_to_the_bit(bits, group_size, dtype):
    mx = pytest.importorskip("mlx.core")
    weights = mx.random.normal((6, 256), key=mx.random.key(bits)).astype(getattr(mx, dtype))
    packed, scales, biases = mx.quantize(weights, group_size=group_size, bits=bits)
    wide = [array.astype(mx.float32) for array in (scales, biases)]
    want = np.array(mx.dequantize(packed, *wide, group_size=group_size, bits=bits))
    own = [torch.from_numpy(np.array(array)) for array in (packed, *wide)]
    got = mlx_folder.dequantize(*own, bits=bits, group_size=group_size)
    np.testing.assert_array_equal(got.numpy(), want)
    assert len(np.unique(want)) > 2**bits  # nothing was lost in the making of the case


def test_numbers_are_unpacked_as_a_little_endian_stream():
    # 6 bits: 1, 2, 3, 4 -> 1 | 2 << 6 | 3 << 12 | 4 << 18, and so on; 16 numbers in 3 words
    stream = sum(n << (6 * i) for i, n in enumerate(range(1, 17)))
    words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(3)]
    packed = torch.from_numpy(np.array([words], np.uint32))
    assert mlx_folder.unpack(packed, 6).tolist() == [list(range(1, 17))]


def dequantised_oracle(folder: Path, target: Path):
    """mlx's own dequantisation of a folder, as transformers reads it."""
    import mlx.core as mx
    from mlx_lm import utils

    from fpo_mlx.model.load import dequantize

    model, config = utils.load_model(folder)
    dequantize(model)
    mx.eval(model.parameters())
    utils.save_model(target, model)
    plain = {k: v for k, v in config.items() if not k.startswith("quantization")}
    (target / "config.json").write_text(json.dumps(plain))
    return oracle.load_oracle(target)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_a_quantised_mlx_folder_is_scored_with_exactly_its_weights(family, tmp_path):
    source = tiny_models.MAKERS[family](tmp_path / "hf", hidden_size=64, intermediate_size=64)
    folder = save_with_mlx(source, tmp_path / "q4", group_size=32, bits=4)
    model = dequantised_oracle(folder, tmp_path / "plain")
    pairs, saes = make_pairs(3), [make_sae(Site(2), 64)]
    backend = TorchBackend(folder, saes=saes, device="cpu")
    assert any("dequantised" in note for note in backend.notes)
    assert_scores_are_the_oracle_s(model, saes, pairs, backend.score(pairs))
    full = TorchBackend(source, device="cpu").score(pairs)
    assert abs(full[0][0].logps - backend.score(pairs)[0][0].logps) > 1e-3


def test_layers_with_their_own_bits_are_dequantised_with_them(tmp_path):
    source = tiny_models.tiny_llama(tmp_path / "hf", hidden_size=64, intermediate_size=64)

    def choose(path, module):
        if "v_proj" in path:
            return {"bits": 8, "group_size": 32}
        return "embed" not in path

    folder = save_with_mlx(
        source, tmp_path / "mixed", group_size=64, bits=3, quant_predicate=choose
    )
    model = dequantised_oracle(folder, tmp_path / "plain")
    pairs = make_pairs(3)
    scores = TorchBackend(folder, device="cpu").score(pairs)
    assert_scores_are_the_oracle_s(model, [], pairs, scores)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe", "mixtral"])
def test_an_unquantised_mlx_folder_scores_as_its_source(family, tmp_path):
    source = tiny_models.MAKERS[family](tmp_path / "hf")
    folder = save_with_mlx(source, tmp_path / "mlx")
    assert mlx_folder.is_mlx_folder(folder, mlx_folder.read_config(folder))
    assert not mlx_folder.is_mlx_folder(source, mlx_folder.read_config(source))
    pairs = make_pairs(3)
    scores = TorchBackend(folder, device="cpu").score(pairs)
    assert_scores_are_the_oracle_s(oracle.load_oracle(source), [], pairs, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp4"}, "quantised as mxfp4"),
        ({"bits": 7}, "with 7 bits"),
        ({"group_size": 64}, "do not make 4 bits in groups of 64"),
    ],
)
def test_a_quantisation_that_cannot_be_read_is_refused(tmp_path, change, message):
    source = tiny_models.tiny_llama(tmp_path / "hf", hidden_size=64, intermediate_size=64)
    folder = save_with_mlx(source, tmp_path / "q4", group_size=32, bits=4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        TorchBackend(folder, device="cpu")


def test_weights_that_are_not_the_model_s_are_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "lame")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    with pytest.raises(ModelError, match=r"missing keys: model.layers.1.mlp.up_proj.weight"):
        TorchBackend(folder, device="cpu")


# Adapters -----------------------------------------------------------------------------------------


def save_adapter(source: Path, target: Path, kind: str, keys: list[str] | None = None) -> Path:
    """An adapter as mlx-lm's own layers make it, with weights that are not zero."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    lora = {
        "rank": 4,
        "scale": 3.0,
        "dropout": 0.0,
        "keys": keys or ["self_attn.q_proj", "mlp.down_proj"],
    }
    model, _ = load_model(source)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, 2, lora, use_dora=kind == "dora")
    key = iter(mx.random.split(mx.random.key(3), 99))
    noise = {"lora_a": 0.3, "lora_b": 0.3, "m": 0.1}

    def shake(path, array):
        scale = noise.get(path.rpartition(".")[2], 0.0)
        return array + scale * mx.random.normal(array.shape, key=next(key))

    model.update(tree_map_with_path(shake, model.trainable_parameters()))
    target.mkdir()
    mx.save_safetensors(
        str(target / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": lora}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def mlx_logps(folder: Path, adapter: Path, pair: TokenPair) -> list[float]:
    """Log-probs of a pair by mlx-lm with the adapter loaded by mlx-lm itself."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model = load_adapters(model, str(adapter))
    model.eval()
    sums = []
    for response in pair.responses:
        tokens = np.concatenate([pair.prompt, response])
        logits = model(mx.array(tokens[None, :-1]))[0].astype(mx.float32)
        every = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        sums.append(float(every[np.arange(len(tokens) - 1), tokens[1:]][-len(response) :].sum()))
    return sums


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_scores_as_mlx_lm_runs_it(kind, quantised, tmp_path):
    folder = tiny_models.tiny_llama(tmp_path / "hf", hidden_size=64, intermediate_size=64)
    if quantised:
        folder = save_with_mlx(folder, tmp_path / "q8", group_size=32, bits=8)
    adapter = save_adapter(folder, tmp_path / "adapter", kind)
    pairs = make_pairs(3)
    backend = TorchBackend(folder, adapter, device="cpu")
    base = TorchBackend(folder, device="cpu").score(pairs)
    for pair, scores, plain in zip(pairs, backend.score(pairs), base, strict=True):
        want = mlx_logps(folder, adapter, pair)
        np.testing.assert_allclose([s.logps for s in scores], want, rtol=1e-4)
        assert abs(plain[0].logps - want[0]) > 0.01
    assert any("4 adapted layers" in note for note in backend.notes)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_does_not_round_a_small_adapter_away(kind, bias, tmp_path):
    """Weights of +-1, which are 1/128 apart in bfloat16, and a change of 1/512 of each.

    Merged, nothing of it is left. 512 inputs of 1: it adds 1 to each output. DoRA has m twice the
    norm here, which doubles what lies before the bias.
    """
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.layer = layer = torch.nn.Linear(512, 8, bias=bias, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(0, 2, (8, 512), generator=generator) * 2 - 1)
    x, shift = torch.ones(1, 512, dtype=torch.bfloat16), torch.zeros(8)
    if bias:
        torch.nn.init.constant_(layer.bias, 0.25)
        shift += 0.25
    tensors = {"layer.lora_a": torch.full((512, 2), 1 / 512), "layer.lora_b": torch.ones(2, 8) / 4}
    sums, times = layer.weight.float().sum(dim=1), 1.0
    if kind == "dora":
        times = 2.0
        tensors["layer.m"] = 2.0 * (layer.weight.float() + 1 / 512).norm(dim=1)
    safetensors.torch.save_file(tensors, tmp_path / "adapters.safetensors")
    lora = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["layer"]}
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert add_adapter(model, tmp_path) == 1
    with torch.no_grad():
        found = layer(x).float()[0]
    np.testing.assert_allclose(found, times * (sums + 1.0) + shift, atol=0.26)  # as bfloat16 rounds


def test_an_adapter_on_the_embedding_is_merged_too(tmp_path):
    folder = tiny_models.tiny_llama(tmp_path / "hf")
    adapter = save_adapter(folder, tmp_path / "adapter", "lora")
    tensors = safetensors.torch.load_file(adapter / "adapters.safetensors")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tiny_models.VOCAB, 4, generator=generator)
    b = torch.randn(4, tiny_models.HIDDEN, generator=generator)
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    safetensors.torch.save_file(tensors, adapter / "adapters.safetensors")
    model = oracle.load_oracle(folder)
    model.model.embed_tokens.weight += 3.0 * (a.double() @ b.double())
    pairs = make_pairs(2)
    scores = TorchBackend(folder, adapter, device="cpu").score(pairs)
    assert_scores_are_the_oracle_s(model, [], pairs, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.layers.9.mlp.up_proj.lora_a": torch.zeros(32, 4)}, "lacks a part"),
        (lambda t: {k.replace("layers.3", "layers.9"): v for k, v in t.items()}, "nothing there"),
        (lambda t: {k: v.T if "_a" in k else v for k, v in t.items()}, "factors of shapes"),
        (
            lambda t: {
                k: torch.zeros(32, 4) if "_a" in k else torch.zeros(4, 5) for k, v in t.items()
            },
            r"shape \[5, 32\]",
        ),
    ],
    ids=["half a layer", "no such layer", "transposed", "other shape"],
)
def test_an_adapter_of_another_model_is_refused(llama, tmp_path, change, message):
    adapter = save_adapter(llama, tmp_path / "adapter", "lora")
    tensors = change(safetensors.torch.load_file(adapter / "adapters.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, adapter / "adapters.safetensors")
    with pytest.raises(FpoError, match=message):
        TorchBackend(llama, adapter, device="cpu")


def test_a_full_fine_tune_is_not_taken_for_an_adapter(llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "adapter", "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fine_tune_type": "full"}))
    with pytest.raises(ModelError, match=r"'full'.*wanted lora or dora"):
        TorchBackend(llama, adapter, device="cpu")


# Refusals and the door ----------------------------------------------------------------------------


def test_an_sae_that_does_not_fit_is_refused(llama):
    with pytest.raises(SaeError, match="blocks 0 to 3"):
        TorchBackend(llama, saes=[make_sae(Site(4), 32)], device="cpu")
    with pytest.raises(SaeError, match="does not say which block"):
        TorchBackend(llama, saes=[replace(make_sae(Site(1), 32), site=None)], device="cpu")
    narrow = TorchBackend(llama, saes=[make_sae(Site(1), 16)], device="cpu")
    with pytest.raises(SaeError, match=r"width 16, but the resid_post of block 1 .* width 32"):
        narrow.score(make_pairs(1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second one's layers lie transposed
def test_an_sae_of_another_width_than_the_projection_reads_is_refused_before_anything_runs(
    family, folder_of
):
    """config.json does not say it of every model."""
    for width in (tiny_models.HIDDEN - 8, tiny_models.HIDDEN):
        words, saes = (folder_of(family),), [make_sae(Site(1, "attn_z"), width)]
        if width == tiny_models.HIDDEN:
            TorchBackend(*words, saes=saes, device="cpu")
            continue
        with pytest.raises(SaeError, match=r"width 24, but the attn_z of block 1 .* width 32"):
            TorchBackend(*words, saes=saes, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:7"}, "--device cuda:7 cannot be used here"),
        ({"device": "toaster"}, "--device toaster cannot be used here"),
        ({"dtype": "int4"}, "--dtype int4: wanted one of float32"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_backend("torch", model_path=llama, **({"device": "cpu"} | settings))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_backend("torch", model_path=tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot load this model"):
        open_backend("torch", model_path=tmp_path, device="cpu")


def test_an_unknown_backend_is_refused(llama):
    with pytest.raises(ConfigError, match="wanted mlx or torch"):
        open_backend("jax", model_path=llama)


def test_a_backend_that_is_not_installed_names_the_other(llama, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install torch.*--backend mlx"):
        open_backend("torch", model_path=llama)
    with pytest.raises(ConfigError, match=r"--backend torch"):
        open_backend("mlx", model_path=llama)


def test_it_works_where_mlx_cannot_be_imported(llama):
    code = f"""
import sys
sys.modules["mlx"] = sys.modules["mlx_lm"] = None
import numpy as np
from fpo_mlx.records import TokenPair
from fpo_mlx.reference import open_backend
ids = np.array([5, 6], np.int32)
engine = open_backend("torch", model_path={str(llama)!r}, device="cpu")
print(engine.score([TokenPair(ids, ids, ids + 1, index=0)])[0][0].logps)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = np.array([5, 6], np.int32)
    want = oracle.score_response(oracle.load_oracle(llama), ids, ids)
    assert float(done.stdout) == pytest.approx(float(want.logps), rel=1e-5)
