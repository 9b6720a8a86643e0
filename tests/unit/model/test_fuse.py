"""Fusing: the same model in one folder, or no folder at all."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from helpers import SIZES, logits_of, open_trainer, random_pairs  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402
from mlx_lm import utils  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from quantised import LATENT, quantised  # noqa: E402

from fpo_mlx.errors import ConfigError, ModelError  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.fuse import fuse, fuse_layers  # noqa: E402
from fpo_mlx.model.load import dequantize, read_model  # noqa: E402
from fpo_mlx.model.rounding import Raised, rounded_to  # noqa: E402
from fpo_mlx.model.trees import arrays_of, module_at  # noqa: E402
from fpo_mlx.records import FusedForm  # noqa: E402
from fpo_mlx.storage.outputs import MODEL  # noqa: E402

TOKENS = [5, 17, 250, 3, 99, 42]
PAIRS = random_pairs(SIZES[:4])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model folder, adapter folder) for every base and kind of adapter."""
    root = tmp_path_factory.mktemp("fuse")
    bases = {}
    for name in ("llama", "gemma2"):
        maker = tiny_models.MAKERS[name]
        bases[name] = maker(root / name, tokenizer=True, intermediate_size=64)
    for bits in (4, 8):
        bases[f"{bits} bits"] = quantised(bases["llama"], root / str(bits), bits)
    out = {}
    for base, folder in bases.items():
        for kind in ("lora", "dora"):
            path = root / f"{base}-{kind}"
            list(open_trainer(folder, path, PAIRS, fine_tune_type=kind, iters=3).run())
            out[base, kind] = folder, path
    return out


def adapted_logits(folder, adapter) -> np.ndarray:
    return logits_of(utils.load(str(folder), adapter_path=str(adapter))[0], TOKENS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_a_fused_float_model_is_the_adapted_one(made, tmp_path, base, kind):
    folder, adapter = made[base, kind]
    report = fuse(str(folder), adapter, tmp_path / "fused")
    assert (report.fused_layers, report.quantized) == (6, False)
    model, _ = utils.load(str(tmp_path / "fused"))
    want = adapted_logits(folder, adapter)
    np.testing.assert_allclose(logits_of(model, TOKENS), want, atol=1e-4)
    assert np.abs(logits_of(utils.load_model(folder)[0], TOKENS) - want).max() > 0.02
    assert not [n for n, _ in nn.utils.tree_flatten(model.parameters()) if "lora" in n]


@pytest.mark.parametrize(
    "readme", ["---\nlicense: gemma\ntags: [a]\n---\n# Base\n", "---\n:", None]
)
def test_the_card_names_the_base_and_its_licence(made, tmp_path, readme):
    """Who publishes the folder owes both."""
    folder, adapter = made["llama", "lora"]
    shutil.copytree(folder, tmp_path / "base")
    if readme is not None:
        (tmp_path / "base/README.md").write_text(readme)
    for named in ("owner/name", None):
        out = tmp_path / f"fused-{named is None}"
        fuse(str(tmp_path / "base"), adapter, out, named=named)
        card = ModelCard.load(out / "README.md")
        assert card.data.base_model == named
        assert card.data.get("license") == ("gemma" if readme and "gemma" in readme else None)
        assert card.data.tags == ["mlx"]
        assert MODEL.foreign(out, [p.name for p in out.iterdir()]) == []


def weights_of(folder) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in mx.load(str(folder / "model.safetensors")).items()}


@pytest.mark.parametrize("part", [0.0, 0.3, 1.7])
def test_a_part_of_an_adapter_is_that_part_of_its_change(made, tmp_path, part):
    folder, adapter = made["llama", "lora"]
    fuse(str(folder), adapter, tmp_path / "whole")
    fuse(str(folder), adapter, tmp_path / "part", FusedForm(scale=part))
    base, whole, some = (weights_of(p) for p in (folder, tmp_path / "whole", tmp_path / "part"))
    assert max(np.abs(whole[name] - base[name]).max() for name in base) > 1e-2
    for name, array in some.items():
        want = base[name] + part * (whole[name] - base[name])
        np.testing.assert_allclose(array, want, rtol=0, atol=1e-6, err_msg=name)


def test_of_a_dora_nothing_is_the_base_and_one_the_adapter_and_the_magnitudes_go_by_the_part(
    made,
):
    folder, adapter = made["llama", "dora"]
    found = {}
    for part in (0.0, 0.4, 1.0):
        model = read_model(str(folder)).model
        adapters.load(model, adapter, scale=part)
        found[part] = dict(adapters.parameters(model)), logits_of(model, TOKENS)
    base = logits_of(utils.load_model(folder)[0], TOKENS)
    np.testing.assert_allclose(found[0.0][1], base, atol=1e-5)
    np.testing.assert_allclose(found[1.0][1], adapted_logits(folder, adapter), atol=1e-5)
    for name, m in found[0.4][0].items():
        if name.endswith(".m"):
            start, end = found[0.0][0][name], found[1.0][0][name]
            np.testing.assert_allclose(m, start + 0.4 * (end - start), rtol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantising_loses_nothing_of_the_adapted_model(made, tmp_path, bits, kind):
    folder, adapter = made[f"{bits} bits", kind]
    report = fuse(str(folder), adapter, tmp_path / "fused", FusedForm(dequantize=True))
    assert not report.quantized
    assert "quantization" not in json.loads((tmp_path / "fused/config.json").read_text())
    got = logits_of(utils.load(str(tmp_path / "fused"))[0], TOKENS)
    np.testing.assert_allclose(got, adapted_logits(folder, adapter), atol=1e-4)


def test_fusing_a_dequantised_model_holds_one_layer_in_float32_at_a_time():
    """All of them at once were 6 bytes a weight: no room for a model of twice its bfloat16 size."""
    n, width = 64, 256
    plain = [nn.Linear(width, width, bias=False) for _ in range(n)]
    model = nn.Sequential(*(nn.QuantizedLinear.from_linear(layer, 64, 4) for layer in plain))
    mx.eval(model.parameters())
    dequantize(model)
    keys = {f"layers.{i}" for i in range(n)}
    linear_to_lora_layers(model, n, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
    del plain
    gc.disable()
    try:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        assert fuse_layers(model, {}, dequantize=True, stored=mx.bfloat16)[0] == n
        peak, after = mx.get_peak_memory() - before, mx.get_active_memory() - before
    finally:
        gc.enable()
    assert peak < 3.0 * n * width**2
    assert after < 2.1 * n * width**2


def test_what_is_written_is_let_go(made, tmp_path, monkeypatch):
    folder, adapter = made["llama", "lora"]
    saved, save = [], utils.save_model

    def spy(target, model, **more):
        saved.append(model)
        save(target, model, **more)

    monkeypatch.setattr(utils, "save_model", spy)
    fuse(str(folder), adapter, tmp_path / "fused")
    assert sum(array.nbytes for _, array in arrays_of(saved[0].parameters())) == 0


def test_latent_attention_is_dequantised_with_the_rest(tmp_path):
    whole = tiny_models.MAKERS["deepseek_v3"](tmp_path / "float", tokenizer=True, **LATENT)
    folder, adapter = quantised(whole, tmp_path / "bits"), tmp_path / "adapter"
    list(open_trainer(folder, adapter, PAIRS, iters=1, keys=("mlp.down_proj",)).run())
    fuse(str(folder), adapter, tmp_path / "fused", FusedForm(dequantize=True))
    got = logits_of(utils.load(str(tmp_path / "fused"))[0], TOKENS)
    np.testing.assert_allclose(got, adapted_logits(folder, adapter), atol=1e-3)


def test_what_cannot_be_dequantised_is_refused_by_name(made, tmp_path, monkeypatch):
    """Its config.json would say that the weights are floats."""
    folder, adapter = made["4 bits", "lora"]
    monkeypatch.setattr("fpo_mlx.model.fuse.dequantize_layers", lambda model: 0)
    with pytest.raises(ConfigError, match=r"--dequantize: .* is a Quantized\w+, which"):
        fuse(str(folder), adapter, tmp_path / "fused", FusedForm(dequantize=True))
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_stays_as_it_was_quantised(made, tmp_path, bits, kind):
    folder, adapter = made[f"{bits} bits", kind]
    assert fuse(str(folder), adapter, tmp_path / "fused", FusedForm(keep_bits="base")).quantized
    config = json.loads((tmp_path / "fused/config.json").read_text())
    assert config["quantization"]["bits"] == bits
    model, _ = utils.load(str(tmp_path / "fused"))
    layers = [m for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert {(m.bits, m.group_size) for m in layers} == {(bits, 32)}
    want = adapted_logits(folder, adapter)
    base = logits_of(utils.load_model(folder)[0], TOKENS)
    error = np.abs(logits_of(model, TOKENS) - want).max()
    # seen: 0.051 at 8 bits; the rounding hardly depends on how large the adapter is
    assert error < (0.08 if bits == 8 else 4) * max(np.abs(want - base).max(), 1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["llama", "4 bits"])
def test_a_fused_layer_keeps_its_bases_float_type(made, tmp_path, base, kind):
    """DoRA's magnitudes are float32, and mlx-lm's fuse would leave their type behind."""
    folder, adapter = made[base, kind]
    model, config = utils.load_model(folder)
    model.set_dtype(mx.bfloat16)
    utils.save(tmp_path / "half", str(folder), model, utils.load_tokenizer(folder), config)
    fuse(str(tmp_path / "half"), adapter, tmp_path / "fused")
    weights = mx.load(str(tmp_path / "fused/model.safetensors"))
    assert {v.dtype for v in weights.values()} <= {mx.bfloat16, mx.uint32}


@pytest.mark.parametrize("keep_bits", [None, "base"])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_a_layer_that_was_raised_from_scales_of_integers_has_the_models_float_type(
    made, tmp_path, mode, keep_bits
):
    """Its base has no floats to go by, and 8 bits have scales and biases: they were float32."""
    source, adapter = made["llama", "lora"]
    model, config = utils.load_model(source)
    model.set_dtype(mx.bfloat16)
    utils.save(tmp_path / "half", str(source), model, utils.load_tokenizer(source), config)
    folder = quantised(tmp_path / "half", tmp_path / mode, 4, mode)
    fuse(str(folder), adapter, tmp_path / "fused", FusedForm(keep_bits=keep_bits))
    weights = mx.load(str(tmp_path / "fused/model.safetensors"))
    assert {v.dtype for v in weights.values()} == {mx.bfloat16, mx.uint32, mx.uint8}


@pytest.mark.parametrize("bits", [3, 6])
def test_dora_on_layers_whose_bits_mlx_lm_cannot_read_is_refused(made, tmp_path, bits):
    folder = quantised(made["llama", "lora"][0], tmp_path / "odd", bits)
    paths = ("model.layers.1.mlp.up_proj",)
    with pytest.raises(ConfigError, match=f"up_proj has {bits} bits"):
        adapters.attach(
            read_model(str(folder)).model, adapters.AdapterSpec("dora", 4, 2, 1.0, 0.0, paths)
        )
    adapters.attach(
        read_model(str(folder)).model, adapters.AdapterSpec("lora", 4, 2, 1.0, 0.0, paths)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_dtype_can_be_chosen_and_config_json_says_it(made, tmp_path, dtype):
    """Readers round the weights to the type that config.json has."""
    folder, adapter = made["llama", "lora"]
    base = shutil.copytree(folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    named = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    (base / "config.json").write_text(json.dumps(config | named))
    fuse(str(base), adapter, tmp_path / "fused", FusedForm(dtype=dtype))
    said = json.loads((tmp_path / "fused/config.json").read_text())
    assert (said["torch_dtype"], said["text_config"]) == (dtype, {"dtype": dtype})
    weights = mx.load(str(tmp_path / "fused/model.safetensors"))
    assert {str(v.dtype) for v in weights.values()} == {f"mlx.core.{dtype}"}


def test_a_failure_while_saving_leaves_the_old_folder_and_nothing_else(made, tmp_path, monkeypatch):
    folder, adapter = made["llama", "lora"]
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused/config.json").write_text("kept")

    def save(target, *args, **kwargs):
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save_model", save)
    with pytest.raises(KeyboardInterrupt):
        fuse(str(folder), adapter, tmp_path / "fused")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "fused", "fused/config.json",
    ]  # fmt: skip


def test_a_fused_folder_takes_the_place_of_the_old_one(made, tmp_path):
    folder, adapter = made["llama", "lora"]
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused/old").write_text("gone")
    fuse(str(folder), adapter, tmp_path / "fused")
    assert not (tmp_path / "fused/old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize(
    ("base", "message"),
    [("phi3", "found a phi3"), ("4 bits", "add --dequantize")],
)
def test_an_impossible_gguf_is_refused_before_anything_is_written(
    made, tmp_path, monkeypatch, base, message
):
    folder, adapter = made["llama" if base == "phi3" else base, "lora"]
    if base == "phi3":
        folder = tiny_models.MAKERS[base](tmp_path / "base", tokenizer=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(utils, "save_model", lambda *a, **k: pytest.fail("something was written"))
    with pytest.raises(ConfigError, match=message):
        fuse(str(folder), adapter, tmp_path / "fused", FusedForm(gguf_path="model.gguf"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../out.gguf", "/tmp/out.gguf", "config.json"])
def test_a_gguf_is_written_into_the_fused_folder_under_a_name_of_its_own(made, tmp_path, name):
    folder, adapter = made["llama", "lora"]
    with pytest.raises(ConfigError, match="--gguf-path .* bare name"):
        fuse(str(folder), adapter, tmp_path / "fused", FusedForm(gguf_path=name))
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizers_files_are_the_bases_byte_for_byte(made, tmp_path):
    folder, adapter = made["llama", "lora"]
    (tmp_path / "base").mkdir()
    for path in folder.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base/special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["a"]}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    fuse(str(tmp_path / "base"), adapter, tmp_path / "fused")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja"):  # fmt: skip
        made_of, got = (tmp_path / where / name for where in ("base", "fused"))
        assert got.read_bytes() == made_of.read_bytes(), name
    for path in (tmp_path / "fused").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_the_template_of_training_is_the_fused_folders(made, tmp_path):
    folder, _ = made["llama", "lora"]
    list(open_trainer(folder, tmp_path / "a", PAIRS, iters=1).run())
    (tmp_path / "a/chat_template.jinja").write_text("mine {{ messages }}")
    report = fuse(str(folder), tmp_path / "a", tmp_path / "fused")
    assert report.template == "the chat template of training"
    assert (tmp_path / "fused/chat_template.jinja").read_text() == "mine {{ messages }}"
    (tmp_path / "other.jinja").write_text("other")
    given = tmp_path / "other.jinja"
    fuse(str(folder), tmp_path / "a", tmp_path / "second", chat_template=given)
    assert (tmp_path / "second/chat_template.jinja").read_text() == "other"


def test_more_bits_keep_more_of_the_change(made, tmp_path):
    """The two figures by their definition, in numpy, from the folders' own weights."""
    folder, adapter = made["4 bits", "lora"]
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    kept = {}
    for bits in ("base", 8):
        report = fuse(str(folder), adapter, tmp_path / str(bits), FusedForm(keep_bits=bits))
        along = off = size = 0.0
        plain = [mx.load(str(f / "model.safetensors")) for f in (folder, tmp_path / str(bits))]
        for name in [n[:-7] for n in tensors if n.endswith("lora_a")]:
            change = scale * np.array(tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
            old, new = (
                np.array(mx.dequantize(
                    w[f"{name}.weight"], w[f"{name}.scales"].astype(mx.float32),
                    w[f"{name}.biases"].astype(mx.float32), 32, b))
                for w, b in zip(plain, (4, 8 if bits == 8 else 4), strict=True)
            )  # fmt: skip
            along += float(((new - old) * change).sum())
            off += float(((new - old - change) ** 2).sum())
            size += float((change**2).sum())
        assert report.kept is not None
        np.testing.assert_allclose(report.kept.share, along / size, rtol=1e-4)
        np.testing.assert_allclose(report.kept.error, (off / size) ** 0.5, rtol=1e-4)
        kept[bits] = report.kept
    assert kept[8].error < kept["base"].error / 8
    model, _ = utils.load(str(tmp_path / "8"))  # mlx-lm reads the mixture
    assert {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)} == {4, 8}
    for wrong, base in ((4, "4 bits"), (8, "llama")):
        with pytest.raises(ConfigError, match="--keep-bits"):
            fuse(str(made[base, "lora"][0]), adapter, tmp_path / "no", FusedForm(keep_bits=wrong))


def bits_of(folder) -> dict[str, int]:
    model, _ = utils.load(str(folder))
    return {n: m.bits for n, m in model.named_modules() if hasattr(m, "bits")}


def file_size(folder) -> int:
    return sum(v.nbytes for v in mx.load(str(folder / "model.safetensors")).values())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapted_layers_of_a_4_bit_base_have_8_bits_unless_the_bases_are_asked_for(
    made, tmp_path, kind
):
    """Rounded to 4 bits, the demo's adapter kept .008 of its margin of .040."""
    folder, adapter = made["4 bits", kind]
    usual = fuse(str(folder), adapter, tmp_path / "usual")
    as_base = fuse(str(folder), adapter, tmp_path / "base", FusedForm(keep_bits="base"))
    adapted = set(adapters.read_spec(adapter, read_model(str(folder)).model).keys)
    bits = bits_of(tmp_path / "usual")
    assert {n for n, b in bits.items() if b == 8} == adapted
    assert set(bits.values()) == {4, 8}
    assert set(bits_of(tmp_path / "base").values()) == {4}
    want, found = adapted_logits(folder, adapter), {}
    for name in ("usual", "base"):
        got = logits_of(utils.load(str(tmp_path / name))[0], TOKENS)
        found[name] = np.abs(got - want).max()
    assert found["usual"] < found["base"] / 5
    added = file_size(tmp_path / "usual") - file_size(tmp_path / "base")
    assert usual.raised == Raised(layers=len(adapted), bits=8, base_bits=(4,), added=added)
    assert (as_base.raised, usual.below, as_base.below) == (None, 0, len(adapted))


@pytest.mark.parametrize(("base", "form"), [
    ("llama", FusedForm()), ("8 bits", FusedForm()), ("4 bits", FusedForm(dequantize=True)),
    ("4 bits", FusedForm(keep_bits="base")), ("llama", FusedForm(keep_bits="base")),
])  # fmt: skip
def test_where_no_layer_has_fewer_bits_or_none_are_wanted_nothing_is_raised(
    made, tmp_path, base, form
):
    folder, adapter = made[base, "lora"]
    report = fuse(str(folder), adapter, tmp_path / "fused", form)
    assert (report.raised, report.unreached) == (None, 0)
    kept = bits_of(tmp_path / "fused")
    assert kept == ({} if form.dequantize else bits_of(folder))


def test_bits_that_are_asked_for_where_weights_become_floats_are_refused(made, tmp_path):
    folder, adapter = made["4 bits", "lora"]
    form = FusedForm(dequantize=True, keep_bits=8)
    with pytest.raises(ConfigError, match="--keep-bits and --dequantize exclude each other"):
        fuse(str(folder), adapter, tmp_path / "fused", form)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_layers_of_4_bit_floats_are_kept_at_8_bits_that_mlx_lm_reads(made, tmp_path, mode):
    source, adapter = made["llama", "lora"]
    folder = quantised(source, tmp_path / mode, 4, mode)
    report = fuse(str(folder), adapter, tmp_path / "fused")
    assert report.raised is not None
    assert (report.raised.layers, report.raised.base_bits, report.unreached) == (6, (4,), 0)
    fuse(str(folder), adapter, tmp_path / "base", FusedForm(keep_bits="base"))
    want = adapted_logits(folder, adapter)
    off = {name: np.abs(logits_of(utils.load(str(tmp_path / name))[0], TOKENS) - want).max()
           for name in ("fused", "base")}  # fmt: skip
    assert off["fused"] < min(0.3, off["base"] / 5)  # seen: 0.12 and 0.14


def test_of_a_mixed_model_only_layers_of_fewer_bits_are_raised(made, tmp_path):
    """config.json says 8 bits of all, and 4 of some: the bits of each layer count."""
    folder, adapter = made["8 bits", "lora"]
    model, config = utils.load_model(folder)
    low = "model.layers.0.mlp.down_proj"
    layer = module_at(model, low)
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 8)
    model.update_modules(tree_unflatten([(low, nn.QuantizedLinear.from_linear(plain, 32, 4))]))
    config["quantization"][low] = {"group_size": 32, "bits": 4}
    utils.save(tmp_path / "mixed", str(folder), model, utils.load_tokenizer(folder), config)
    report = fuse(str(tmp_path / "mixed"), adapter, tmp_path / "fused")
    assert report.raised is not None
    assert (report.raised.layers, report.raised.base_bits) == (1, (4,))
    assert set(bits_of(tmp_path / "fused").values()) == {8}


def test_rows_that_make_no_group_of_affine_keep_the_bases_form():
    """16 is a group of nvfp4; 48 numbers make no groups of 32."""
    base = nn.QuantizedLinear.from_linear(nn.Linear(48, 32, bias=False), 16, 4, mode="nvfp4")
    fused = rounded_to(base, mx.zeros((32, 48)), 8)
    assert (fused.mode, fused.bits) == ("nvfp4", 4)


def test_a_folder_that_is_no_model_or_no_adapter_is_a_plain_error(made, tmp_path):
    folder, adapter = made["llama", "lora"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        fuse(str(tmp_path / "empty"), adapter, tmp_path / "fused")
    with pytest.raises(ModelError, match="found no adapter_config.json"):
        fuse(str(folder), tmp_path / "empty", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_fusing_prints_nothing(made, tmp_path, capsys):
    folder, adapter = made["llama", "lora"]
    fuse(str(folder), adapter, tmp_path / "fused")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("bits", "wanted"), [(5, 8), (8, 8)])
def test_keep_bits_never_lowers_the_bits_of_a_mixed_model(bits, wanted):
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 64, bias=False), 32, 8)
    assert rounded_to(layer, mx.zeros((64, 64)), bits).bits == wanted
    low = nn.QuantizedLinear.from_linear(nn.Linear(64, 64, bias=False), 32, 4)
    assert rounded_to(low, mx.zeros((64, 64)), bits).bits == bits
