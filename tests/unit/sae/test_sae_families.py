"""Every public SAE layout against its own formula in float64, and against the peers' outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sae_files import Case, D, F, save_torch
from tiny_saes import CASES

from fpo_mlx.errors import SaeError
from fpo_mlx.sae import FORMATS, load_sae, sniff
from fpo_mlx.sae.encode import decode, encode

SHARED = Path(__file__).resolve().parents[4] / "shared" / "fixtures" / "sae"
RTOL = 1e-5  # of the largest activation
REFUSED = {  # folders that must not be read, and a word of the reason
    "gemma_scope_embedding": "embeddings",
    "saelens_matching_pursuit": "iterative",
    "temporal_sae": "whole sequence",
}
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((7, D)) * 3
    x[4] *= 10  # an outlier token
    return x.astype(np.float32)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=RTOL * np.abs(wanted).max())


@by_name
@pytest.mark.parametrize("seed", [0, 1])
def test_a_family_encodes_as_its_formula_says(case: Case, seed: int, tmp_path: Path):
    made = case.make(tmp_path, np.random.default_rng(seed))
    sae = load_sae(made.path, allow_pickle=case.pickled, **made.options)
    wanted = made.encode(inputs(seed).astype(np.float64))
    assert (wanted != 0).sum() > 10
    assert_close(encode(sae, inputs(seed)), wanted)
    assert sae.w_enc.shape == (D, F)
    assert (str(sae.site) if sae.site else None) == case.site
    assert sae.format == case.format


@by_name
def test_the_family_is_recognised_and_can_be_forced(case: Case, tmp_path: Path):
    made = case.make(tmp_path, np.random.default_rng(2))
    assert sniff(made.path, allow_pickle=case.pickled) == case.format
    options = {"allow_pickle": case.pickled, **made.options}
    guessed = load_sae(made.path, **options)
    forced = load_sae(made.path, format=case.format, **options)
    assert forced.fingerprint() == guessed.fingerprint()
    # the folder above, when it holds this one SAE, is as good
    assert load_sae(tmp_path, **options).fingerprint() == guessed.fingerprint()


@by_name
def test_leaving_the_decoder_out_changes_no_feature(case: Case, tmp_path: Path):
    made = case.make(tmp_path, np.random.default_rng(3))
    options = {"allow_pickle": case.pickled, **made.options}
    whole, half = (load_sae(made.path, decoder=wanted, **options) for wanted in (True, False))
    assert half.w_dec is None
    assert half.fingerprint() == whole.fingerprint()
    with pytest.raises(SaeError, match="no decoder"):
        decode(half, np.zeros((1, F), np.float32), np.zeros((1, D), np.float32))


@pytest.mark.parametrize("case", [c for c in CASES if c.pickled], ids=lambda case: case.name)
def test_pickled_files_need_the_flag(case: Case, tmp_path: Path):
    made = case.make(tmp_path, np.random.default_rng(4))
    with pytest.raises(SaeError, match="--allow-pickle"):
        load_sae(made.path, **made.options)


def test_the_table_of_cases_covers_every_format():
    by_name_only = {"llama_scope_saelens"}  # never recognised, only asked for
    assert {case.format for case in CASES} == set(FORMATS) - by_name_only


def test_llama_scope_can_be_read_the_saelens_way_by_format_name(tmp_path: Path):
    case = next(case for case in CASES if case.name == "llama_scope_saelens")
    made = case.make(tmp_path, np.random.default_rng(5))
    sae = load_sae(made.path, format="llama_scope_saelens")
    assert_close(encode(sae, inputs(5)), made.encode(inputs(5).astype(np.float64)))
    assert sae.fingerprint() != load_sae(made.path).fingerprint()


@pytest.mark.parametrize("name", ["topk", "gated", "constant_norm", "layer_norm", "standard"])
def test_decode_undoes_the_scaling_of_the_input(name: str, tmp_path: Path):
    made = next(c for c in CASES if c.name == f"saelens_{name}").make(
        tmp_path, np.random.default_rng(6)
    )
    sae = load_sae(made.path)
    x = inputs(6).astype(np.float64)
    assert sae.w_dec is not None
    assert sae.b_dec is not None
    recon = made.encode(x) @ sae.w_dec.astype(np.float64) + sae.b_dec
    if name == "layer_norm":
        recon = recon * x.std(1, ddof=1, keepdims=True) + x.mean(1, keepdims=True)
    if name == "constant_norm":
        recon = recon * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    assert_close(decode(sae, encode(sae, inputs(6)), inputs(6)), recon)


def test_the_hand_made_torch_files_are_those_that_torch_reads(tmp_path: Path):
    torch = pytest.importorskip("torch")
    tree = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "k": np.array(4, dtype=np.int32),
        "n": "x",
    }
    read = torch.load(save_torch(tmp_path / "x.pt", tree), weights_only=True)
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (int(read["k"]), read["n"]) == (4, "x")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_file_that_torch_itself_wrote_is_read(dtype: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from fpo_mlx.sae.torchfile import open_torch

    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(getattr(torch, dtype))
    weights = {"view": whole[1:, ::2], "turned": torch.nn.Parameter(whole.T), "k": 3}
    torch.save(weights, tmp_path / "x.pt")
    file = open_torch(tmp_path / "x.pt")
    np.testing.assert_array_equal(file.read("view"), np.arange(24).reshape(4, 6)[1:, ::2])
    np.testing.assert_array_equal(file.read("turned"), np.arange(24).reshape(4, 6).T)
    assert file.extras == {"k": 3}


def _fixtures() -> list[Path]:
    return sorted(SHARED.glob("*/fixture.json")) if SHARED.is_dir() else []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the peers' fixtures are not beside this checkout")
@pytest.mark.parametrize("facts", _fixtures(), ids=[path.parent.name for path in _fixtures()])
def test_the_peers_own_outputs_are_met(facts: Path):
    folder, info = facts.parent, json.loads(facts.read_text())
    options = {"allow_pickle": True, "name": info.get("repo_id", "")}
    if folder.name in REFUSED:
        with pytest.raises(SaeError, match=REFUSED[folder.name]):
            load_sae(folder, **options)
        return
    if folder.name == "llama_scope_original":
        authors = encode(load_sae(folder, **options), np.load(folder / "inputs.npy"))
        assert_close(authors, np.load(folder / "expected_acts_lm_saes.npy"))
        options["llama_scope_gate"] = "saelens"
    sae = load_sae(folder, **options)
    x = np.load(folder / "inputs.npy")
    x = x.reshape(len(x), -1)  # hook_z: heads side by side
    acts, wanted = encode(sae, x), np.load(folder / "expected_acts.npy")
    if info.get("compare") == "sorted_values_and_recon":  # ties: any of the equal ones will do
        acts, wanted = np.sort(acts, axis=1), np.sort(wanted, axis=1)
    assert_close(acts, wanted)
    if (folder / "expected_recon.npy").exists() and sae.w_dec is not None:
        recon = np.load(folder / "expected_recon.npy")
        assert_close(decode(sae, encode(sae, x), x), recon.reshape(len(x), -1))


AFTER_ATTENTION = [("google/gemma-2-2b", "attn_out"), ("allenai/OLMo-2-0425-1B", "attn_out"),
                   ("Qwen/Qwen3-0.6B", "mlp_in"), ("my-model", None)]  # fmt: skip


@pytest.mark.parametrize(("model", "kind"), AFTER_ATTENTION)
def test_the_norm_after_attention_is_read_by_the_model_that_the_files_name(model, kind, tmp_path):
    named = {"hf_hook_name": "model.layers.3.post_attention_layernorm", "model_name": model,
             "hook_name": "blocks.3.hook_mlp_in"}  # fmt: skip
    saelens, sparsify = tmp_path / "saelens", tmp_path / "layers.3.post_attention_layernorm"
    rng = np.random.default_rng(0)
    made = next(case for case in CASES if case.name == "saelens_topk").make(saelens, rng)
    config = json.loads((made.path / "cfg.json").read_text())
    (made.path / "cfg.json").write_text(json.dumps(config | {"metadata": named}))
    plain = next(case for case in CASES if case.name == "sparsify_topk").make(tmp_path / "a", rng)
    plain.path.rename(sparsify)
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    for path in (made.path, sparsify):
        site = load_sae(path).site
        assert (site.kind if site else None) == kind
