"""The command line as a user meets it: exit codes, one plain message, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from command_line import (  # noqa: F401
    BLOCK,
    ROWS,
    lines,
    own_cache_and_signals,
    random_sae,
    refused,
    run,
    train,
    usual,
)

from fpo_mlx import cli, open_model, read_sae
from fpo_mlx.errors import FpoError
from fpo_mlx.machine import device, upstream
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.sae.encode import encode

pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, SAEs, pairs, and a cache of the first model: made once, written to by no test."""
    root = tmp_path_factory.mktemp("cli")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    tiny_models.tiny_llama(root / "other", tokenizer=True, seed=1)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    write_saelens(random_sae(tiny_models.HIDDEN + 16), root / "wide")
    write_saelens(random_sae(tiny_models.HIDDEN, block=9), root / "deep")
    lines(root / "data" / "train.jsonl", *ROWS)
    lines(root / "data" / "valid.jsonl", {**ROWS[0], "prompt": "Held out?"})
    done = run("precompute", *usual(root), "--output", root / "ref")
    assert done.exit_code == 0, done.stderr
    return root


def test_an_unknown_flag_is_a_usage_error():
    refused(run("train", "--learning-rat", "1"), 2, "No such option", "--learning-rat")


@pytest.mark.parametrize(
    ("library", "installed", "advice"),
    [
        ("libmlx.so", "mlx", "pip install 'mlx[cpu]'"),
        ("libcuda.so.1", "mlx-cuda-13", "needs an NVIDIA card and its driver"),
    ],
)
def test_an_mlx_that_does_not_load_says_what_it_lacks(monkeypatch, library, installed, advice):
    """As Python raises it: by the name `core`, with the path of MLX's own module."""

    def gone(*_):
        text = f"{library}: cannot open shared object file: No such file or directory"
        raise ImportError(text, name="core", path="/site-packages/mlx/core.cpython-311.so")

    monkeypatch.setattr(cli.Group, "invoke", gone)
    monkeypatch.setattr(upstream, "version", lambda name: "1" if name == installed else None)
    monkeypatch.setattr(upstream.sys, "platform", "linux")
    parts = f"MLX cannot be imported: {library}", advice, "--backend torch"
    refused(run("convert"), FpoError.exit_code, *parts)


def test_an_unknown_command_is_a_usage_error():
    refused(run("trian"), 2, "trian")


@pytest.mark.parametrize("command", ["train", "precompute", "evaluate"])
@pytest.mark.parametrize("flag", ["model", "data"])
def test_a_missing_model_or_data_is_a_usage_error(place, command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run(command, *usual(place, **{flag: None})), 2, f"--{flag} is missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_missing_sae_names_every_way_on_before_the_model_is_fetched(
    place, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    words = usual(place, sae=None, model="owner/of-many-gigabytes")
    ways = ("--objective tdpo2", "sae list --model owner/of-many-gigabytes", "sae train")
    refused(run(command, *words), 2, "--sae is missing", *ways)
    assert list(tmp_path.iterdir()) == []


def test_fuse_without_a_model_is_a_usage_error(tmp_path):
    refused(run("fuse", "--save-path", tmp_path / "fused"), 2, "--model is missing")


def test_data_that_is_not_there_is_named(place, tmp_path):
    result = train(place, tmp_path / "out", data=tmp_path / "no.jsonl")
    refused(result, 1, tmp_path / "no.jsonl", "no such file")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_splits_is_refused_by_precompute(place, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("precompute", *usual(place, data=tmp_path / "empty"), "--output", tmp_path / "ref")
    refused(result, 1, "train.jsonl", "no such file")
    assert not (tmp_path / "ref").exists()


BAD_ROWS = {
    "no rows": ([], ("rows.jsonl", "no rows")),
    "no chosen": ([*ROWS, {"prompt": "a", "rejected": "b"}], ("rows.jsonl:5", "chosen")),
    "empty response": ([{"prompt": "a", "chosen": "b", "rejected": ""}], ("rows.jsonl:1",)),
    "same responses": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], ("rows.jsonl:1",)),
}


@pytest.mark.parametrize("command", ["train", "precompute", "check"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_data_is_refused_with_its_file_and_line(place, tmp_path, case, command):
    rows, parts = BAD_ROWS[case]
    path = lines(tmp_path / "in" / "rows.jsonl", *rows)
    out = {"train": "--adapter-path", "precompute": "--output", "check": "--fix"}[command]
    sae = None if command == "check" else place / "sae"
    result = run(command, *usual(place, data=path, sae=sae), out, tmp_path / "out")
    if command == "check" and rows:
        assert "refused" in result.stdout
        result.stdout_bytes = b""  # its table is not the message
    refused(result, 3, *parts)
    if command != "check":
        assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_sae_of_another_width_is_refused_with_both_widths(place, tmp_path):
    result = train(place, tmp_path / "out", sae=place / "wide")
    refused(result, 1, tiny_models.HIDDEN, tiny_models.HIDDEN + 16)
    assert list(tmp_path.iterdir()) == []


def test_where_the_config_does_not_say_what_a_projection_reads_the_model_does(place, tmp_path):
    """Blocks of PLaMo 2 differ in it."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size_per_head": 8}))
    flags = ["--model", model, "--site", "attn_z"]
    found = f"has {tiny_models.HIDDEN} (heads x head size)"
    result = train(place, tmp_path / "out", *flags, sae=place / "wide")
    refused(result, 1, "attn_z", found)
    assert "scoring" not in result.stderr
    with pytest.raises(FpoError, match="vectors of 48, but at attn_z of block"):
        open_model(model, [read_sae(place / "wide", site="attn_z")])
    held = [*flags, "--constraint", "activations"]
    refused(train(place, tmp_path / "out", *held, sae=place / "wide"), 1, "attn_z", found)
    texts = ["--sae", place / "wide", "--data", place / "data"]
    refused(run("sae", "evaluate", *texts, *flags), 1, "attn_z", found)
    cache = ["--output", tmp_path / "cache", "--no-check-sae"]
    refused(run("precompute", *texts, *flags, *cache), 1, "attn_z", found)
    done = train(place, tmp_path / "out", *flags)
    assert done.exit_code == 0, done.stderr


def test_an_sae_of_a_block_that_the_model_lacks_is_refused(place, tmp_path):
    refused(train(place, tmp_path / "out", sae=place / "deep"), 1, "block 9", "blocks 0 to 3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "block", "warned"),
    [([], 1, True), (["--target-drift", 0.1], 1, True), (["--alpha", 0], 1, False),
     (["--objective", "dpo"], 1, False), ([], 2, False)],
)  # fmt: skip
def test_an_sae_in_the_middle_is_warned_of_where_it_is_to_hold_the_model(
    place, tmp_path, words, block, warned
):
    """Of four blocks the one after the second is the middle; the third is near the output."""
    write_saelens(random_sae(tiny_models.HIDDEN, block=block), tmp_path / "sae")
    done = train(place, tmp_path / "out", *words, sae=tmp_path / "sae")
    assert done.exit_code == 0, done.stderr
    assert (f"the SAE reads block {block} of 4 (from 0)" in done.stderr) is warned


@pytest.mark.parametrize("words", [[], ["--objective", "dpo"], ["--adapt-above-sae"]])
def test_an_sae_of_what_goes_into_the_first_block_is_refused(place, tmp_path, words):
    """No layer lies before it: "there are 0 blocks up to block -1" named no way on."""
    where = ["--layer", 0, "--site", "resid_pre"]
    result = train(place, tmp_path / "out", *where, *words)
    refused(result, 2, "no adapted layer", "the resid_pre of block 0", "nearer to the output")


def test_adapters_out_of_reach_are_refused_before_the_reference_runs(place, tmp_path):
    result = train(place, tmp_path / "out", "--adapt-above-sae", "--num-layers", 1)
    refused(result, 2, "no adapted layer", f"block {BLOCK}")
    assert "scoring" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_its_predicted_and_its_measured_peak(place, tmp_path):
    result = train(place, tmp_path / "out", "--reference", place / "ref")
    assert result.exit_code == 0, result.stderr
    assert "predicted peak memory of training" in result.stderr
    assert re.search(r"peak memory [\d.]+ GB, predicted [\d.]+ GB", result.stderr)
    memory = json.loads((tmp_path / "out" / "run.json").read_text())["memory"]
    assert set(memory) == {"predicted_peak_gb", "measured_peak_gb"}
    assert min(memory.values()) > 0


def test_a_run_that_will_not_fit_says_so_and_what_fits_before_the_reference_runs(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(device, "memory", lambda: 1e5)  # bytes: the weights alone need more
    result = train(place, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "MLX has 0.00 GB here" in result.stderr
    assert "take a smaller model" in result.stderr
    assert result.stderr.index("take a smaller model") < result.stderr.index("scoring")
    (peak,) = _peaks(place, tmp_path / "plain", monkeypatch, 1e12)
    monkeypatch.setattr(device, "memory", lambda: peak - 1)
    told = train(place, tmp_path / "small")
    assert "it may swap, or be ended" in told.stderr
    assert "What fits" in told.stderr
    assert "--grad-checkpoint" in told.stderr


def test_freed_buffers_that_can_be_given_back_are_no_need_of_a_run(place, tmp_path, monkeypatch):
    """They are up to 2 GB: a run that fits without them was told that it will swap."""
    with device.using(replace(device.gpu("metal", 8e9), cache_limit=1 << 30)):
        (peak,) = _peaks(place, tmp_path / "plain", monkeypatch, 1e12)
        assert peak < 1e9
        monkeypatch.setattr(device, "memory", lambda: peak + 1)
        assert "warning: this training needs" not in train(place, tmp_path / "run").stderr
        told = run("plan", *usual(place), "--top-k", 5, "--batch-size", 1)
    assert "train: peak 0.00 GB, fits" in told.stdout
    assert "up to 1.07 GB of freed buffers" in told.stdout


def test_a_resumed_run_that_will_not_fit_is_offered_only_what_it_may_change(
    place, tmp_path, monkeypatch
):
    flags = ("--reference", place / "ref", "--iters", 1, "--micro-batch-size", 2)
    assert train(place, tmp_path / "out", *flags, "--batch-size", 2).exit_code == 0
    (peak,) = _peaks(place, tmp_path / "plain", monkeypatch, 1e12)
    found = ((peak, "What fits"), (1e5, "Nothing that a resumed run may change"))
    for iters, (memory, said) in enumerate(found, start=2):
        monkeypatch.setattr(device, "memory", lambda memory=memory: memory)
        more = ("--resume", "--iters", iters)
        told = train(place, tmp_path / "out", *flags, "--batch-size", 2, *more)
        assert told.exit_code == 0, told.stderr
        (warning,) = [x for x in told.stderr.splitlines() if "this training needs" in x]
        assert said in warning
        assert "--micro-batch-size" not in warning


def _peaks(place, out, monkeypatch, memory: float) -> list[float]:
    """Bytes that `plan` predicts for the same training."""
    monkeypatch.setattr(device, "memory", lambda: memory)
    words = [*usual(place), "--top-k", 5, "--batch-size", 1, "--json", out.with_suffix(".json")]
    assert run("plan", *words).exit_code == 0
    assert "warning: this training needs" not in train(place, out).stderr
    return [json.loads(out.with_suffix(".json").read_text())["train"]["peak_bytes"]]


def test_on_a_gpu_the_peaks_are_compared_without_freed_buffers_which_mlx_does_not_count(
    place, tmp_path
):
    with device.using(device.gpu("metal", 8e9)) as record:
        result = train(place, tmp_path / "out", "--reference", place / "ref")
    assert result.exit_code == 0, result.stderr
    before = float(re.findall(r"predicted peak memory of training: ([\d.]+) GB", result.stderr)[0])
    after, kept = re.findall(
        r"peak memory [\d.]+ GB, predicted ([\d.]+) GB, beside ([\d.]+) GB of", result.stderr
    )[0]
    assert float(kept) == pytest.approx(record.cache_limit / 1e9, abs=0.01)
    assert before == float(after)
    memory = json.loads((tmp_path / "out" / "run.json").read_text())["memory"]
    assert memory["predicted_peak_gb"] == pytest.approx(float(after), abs=0.01)


def test_a_resumed_run_keeps_the_settings_of_its_start(place, tmp_path):
    flags = ("--reference", place / "ref", "--iters", 2)
    assert train(place, tmp_path / "out", *flags).exit_code == 0
    record = (tmp_path / "out" / "run.json").read_text()
    again = train(place, tmp_path / "out", *flags, "--resume")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "out" / "run.json").read_text() == record, "nothing was left to train"


def test_early_stopping_without_validation_pairs_is_refused(place, tmp_path):
    alone = lines(tmp_path / "data" / "train.jsonl", *ROWS)
    result = train(place, tmp_path / "out", "--early-stopping", 2, data=alone)
    refused(result, 2, "--early-stopping 2", "no validation pairs", "valid.jsonl")
    assert not (tmp_path / "out").exists()


def test_adapters_only_above_the_saes_block_are_refused(place, tmp_path):
    result = train(
        place, tmp_path / "out", "--adapt-above-sae", "--num-layers", 1,
        "--reference", place / "ref",
    )  # fmt: skip
    refused(result, 2, "no adapted layer", f"block {BLOCK}")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_model_is_refused_with_both_fingerprints(place, tmp_path):
    before = {p.name: p.read_bytes() for p in (place / "ref").iterdir()}
    result = train(place, tmp_path / "out", "--reference", place / "ref", model=place / "other")
    made_of = json.loads((place / "ref" / "manifest.json").read_text())["identity"]
    refused(result, 1, "model: cache", made_of["model"], "this run")
    assert len(set(re.findall(r"[0-9a-f]{32,}", result.stderr))) == 2
    assert not (tmp_path / "out").exists()
    assert {p.name: p.read_bytes() for p in (place / "ref").iterdir()} == before


@pytest.mark.parametrize("command", ["evaluate", "features"])
def test_a_cache_that_only_training_takes_names_the_way_out(place, tmp_path, command):
    words = ["--split", "valid", "--reference", place / "ref", "--top-k", 5]
    adapter = tmp_path / "out"
    assert train(place, adapter, model=place / "other").exit_code == 0
    result = run(command, *usual(place, model=place / "other"), *words, "--adapter-path", adapter)
    refused(result, 1, "made for something else", "leave `reference` out")


def test_divergence_has_its_own_exit_code_and_leaves_whole_adapters(place, tmp_path):
    result = train(
        place, tmp_path / "out", "--reference", place / "ref", "--learning-rate", 0.3,
        "--max-logp-drop", 0.01, "--iters", 20, "--objective", "simpo",
    )  # fmt: skip
    assert result.exit_code == 4, result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("fpo-mlx: iteration") == 1
    assert "--max-logp-drop 0.01" in result.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"adapters.safetensors", "adapter_config.json", "run.json", "best"} <= names
    assert not [p for p in (tmp_path / "out").rglob("*") if ".tmp" in p.name]


def test_training_evaluating_resuming_and_fusing_work_from_flags_alone(place, tmp_path):
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    reference = ["--reference", place / "ref"]
    done = train(place, out, *reference, "--save-every", 1, "--num-layers", 1)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"adapters in {out}\n"
    more = train(place, out, *reference, "--resume", "--iters", 3, "--num-layers", 1)
    assert more.exit_code == 0, more.stderr
    assert "resumed after iteration 2" in more.stderr
    judged = run(
        "evaluate", *usual(place), *reference, "--adapter-path", out, "--split", "valid",
        "--top-k", 5, "--max-tokens", 8, "--json", scores,
    )  # fmt: skip
    assert judged.exit_code == 0, judged.stderr
    assert json.loads(scores.read_text())["summary"]["n"] == 1
    assert "rewards/accuracies" in judged.stdout
    fused = run(
        "fuse", "--model", place / "model", "--adapter-path", out, "--save-path", tmp_path / "f"
    )
    assert fused.exit_code == 0, fused.stderr
    assert (tmp_path / "f" / "config.json").is_file()


def test_resuming_on_other_data_is_refused(place, tmp_path):
    out, flags = tmp_path / "out", ("--objective", "dpo")
    lines(tmp_path / "data" / "train.jsonl", *ROWS[:2])
    assert train(place, out, *flags, data=tmp_path / "data", sae=None).exit_code == 0
    lines(tmp_path / "data" / "train.jsonl", *ROWS[2:])
    again = train(place, out, *flags, "--resume", data=tmp_path / "data", sae=None)
    refused(again, 2, "fingerprints.data")


def test_a_cache_that_keeps_too_few_features_is_refused(place, tmp_path):
    flags = ["--output", tmp_path / "ref", "--keep-features", 10]
    result = run("precompute", *usual(place), *flags)
    refused(result, 2, "--keep-features 10", "--top-k 50")
    assert not (tmp_path / "ref").exists()


def test_a_cache_of_fewer_features_without_a_place_names_the_one_that_training_needs(
    place, tmp_path
):
    """Training looked for a whole one and scored everything anew."""
    (tmp_path / "c.yaml").write_text("top_k: 5\n")
    made = run("precompute", *usual(place), "-c", tmp_path / "c.yaml", "--keep-features", 10)
    assert made.exit_code == 0, made.stderr
    (folder,) = re.findall(r"give it --reference (\S+)", made.stderr)
    assert "scoring" not in train(place, tmp_path / "out", "--reference", folder).stderr


def test_a_cache_of_the_largest_features_says_what_it_left_out_and_trains(place, tmp_path):
    made = run(
        "precompute", *usual(place), "--top-k", 5, "--output", tmp_path / "ref",
        "--keep-features", 10,
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert float(re.findall(r"left out ([\d.]+)%", made.stdout)[0]) > 0
    trained = train(place, tmp_path / "out", "--reference", tmp_path / "ref")
    assert trained.exit_code == 0, trained.stderr
    assert "10 largest features" in trained.stderr
    verify = ["cache", "verify", tmp_path / "ref", *usual(place), "--top-k", 5]
    assert run(*verify).exit_code == 0
    refused(train(place, tmp_path / "b", "--reference", tmp_path / "ref", "--top-k", 11), 2, "11")


def test_check_prints_a_table_and_writes_findings_and_the_good_rows(place, tmp_path):
    path = lines(tmp_path / "rows.jsonl", *ROWS, ROWS[0], {"prompt": "a", "chosen": "b"})
    result = run(
        "check", "--model", place / "model", "--data", path, "--json", tmp_path / "found.json",
        "--fix", tmp_path / "clean",
    )  # fmt: skip
    assert result.exit_code == 3
    assert re.search(r"^train +6 +1 +4 ", result.stdout, re.MULTILINE)
    assert re.search(r"^refused +missing field +1 +rows.jsonl:6: ", result.stdout, re.MULTILINE)
    assert re.search(r"^excluded +duplicate +1 +rows.jsonl:5: ", result.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "found.json").read_text())["refused"] == 1
    kept = (tmp_path / "clean" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == ROWS
    good = run("check", "--data", tmp_path / "clean")
    assert good.exit_code == 0
    assert "no --model" in good.stderr
    refused(run("check", "--data", path, "--fix", tmp_path), 2, "lies in it")


def test_sae_commands_list_show_convert_and_encode(place, tmp_path):
    listed = run("sae", "list", "--model", "mlx-community/gemma-2-2b-it-4bit")
    assert "gemma-scope-2b-pt-res" in listed.stdout
    assert "llama" not in listed.stdout.lower()
    lacking = run("sae", "list", "--model", "owner/unheard-of")
    for way in ("sae train --model owner/unheard-of", "--objective tdpo2", "owner/repo/path"):
        assert way in lacking.stderr
    shown = run("sae", "info", place / "sae", "--model", place / "model")
    assert re.search(r"^features +48$", shown.stdout, re.MULTILINE)
    moved = ["--layer", 3, "--site", "mlp_out", "--json", tmp_path / "info.json"]
    for words in ([], ["--model", place / "model"]):
        run("sae", "info", place / "sae", *words, *moved, "--overwrite")
        about = json.loads((tmp_path / "info.json").read_text())
        assert about["site"] == {"layer": 3, "kind": "mlp_out"}
        assert about.get("fits") == (str(place / "model") if words else None)
    refused(run("sae", "info", place / "wide", "--model", place / "model"), 1, 32, 48)
    made = run("sae", "convert", place / "sae", "--output", tmp_path / "int8", "--dtype", "int8")
    assert made.exit_code == 0, made.stderr
    x = np.random.default_rng(0).normal(size=(7, tiny_models.HIDDEN)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for name, tolerance in ((place / "sae", 1e-6), (tmp_path / "int8", 0.1)):
        out = tmp_path / f"{name.name}.npy"
        result = run("sae", "encode", "--sae", name, "--input", tmp_path / "x.npy", "--output", out)
        assert result.exit_code == 0, result.stderr
        wanted = encode(random_sae(tiny_models.HIDDEN), x)
        np.testing.assert_allclose(np.load(out), wanted, atol=tolerance)


def test_encoding_what_is_no_array_is_refused(place, tmp_path):
    (tmp_path / "x.npy").write_text("no array")
    flags = ["--input", tmp_path / "x.npy", "--output", tmp_path / "acts.npy"]
    refused(run("sae", "encode", "--sae", place / "sae", *flags), 1, "x.npy", "cannot be read")
    refused(run("sae", "encode", *flags), 2, "--sae", "wanted exactly one")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_encoding_arrays_that_hold_no_numbers_is_refused(place, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    np.save(tmp_path / "y.npy", np.array(["a", "b"]))
    for name, found in (("x.npz", "several arrays"), ("y.npy", "<U1")):
        flags = ["--input", tmp_path / name, "--output", tmp_path / "acts.npy"]
        refused(run("sae", "encode", "--sae", place / "sae", *flags), 1, name, found, "[N, D]")


def test_the_same_sae_twice_is_refused(place):
    flags = [*usual(place), "--sae", place / "sae"]
    refused(run("precompute", *flags), 2, "--sae", "twice")


def test_options_of_the_torch_backend_are_not_ignored_in_silence(place, tmp_path):
    flags = [*usual(place, sae=None), "--objective", "dpo", "--output", tmp_path / "ref"]
    refused(run("precompute", *flags, "--device", "cuda"), 2, "--device cuda", "--backend torch")
    done = run("precompute", *flags, "--tokens-per-batch", 9)
    assert done.exit_code == 0, done.stderr
    assert "--tokens-per-batch 9 is for --backend torch" in done.stderr


def test_a_run_without_saes_reads_a_cache_that_has_some_and_does_not_extend_it(place, tmp_path):
    """It says so before a model is loaded, and does not blame the data."""
    import shutil

    shutil.copytree(place / "ref", tmp_path / "ref")
    flags = [*usual(place, sae=None), "--objective", "dpo", "--output", tmp_path / "ref"]
    assert run("precompute", *flags).exit_code == 0
    lines(tmp_path / "data" / "train.jsonl", *ROWS, {**ROWS[0], "chosen": "New."})
    refused(
        run("precompute", *flags, "--data", tmp_path / "data"),
        1,
        "can be read here and not extended",
    )


def test_a_home_folder_in_yaml_is_expanded(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("reference: ~/ref\nadapter_path: ~/a\nobjective: dpo\n")
    done = train(place, tmp_path / "unused", "-c", tmp_path / "run.yaml", sae=None)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "ref" / "manifest.json").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("inside", ["a", "a/best"])
def test_a_run_does_not_write_over_the_adapter_that_it_starts_from(place, tmp_path, inside):
    assert train(place, tmp_path / "a").exit_code == 0
    before = (tmp_path / inside / "adapters.safetensors").read_bytes()
    done = train(place, tmp_path / "a", "--init-adapter", tmp_path / inside)
    refused(done, 2, "--adapter-path", tmp_path / inside, "which the command reads")
    assert (tmp_path / inside / "adapters.safetensors").read_bytes() == before


def test_no_validation_is_done_where_none_is_wanted(place, tmp_path):
    assert train(place, tmp_path / "a", "--val-batches", 0).exit_code == 0
    assert '"valid"' not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert not (tmp_path / "a" / "best").exists()


def test_a_start_from_adapters_above_the_sae_is_said(place, tmp_path):
    """As mlx_lm.lora makes them: on the last blocks."""
    made = train(place, tmp_path / "sft", "--objective", "dpo", sae=None)
    assert made.exit_code == 0, made.stderr
    done = train(place, tmp_path / "a", "--init-adapter", tmp_path / "sft")
    assert done.exit_code == 0, done.stderr
    assert f"{tmp_path / 'sft'} adapts blocks up to 3, above the SAE's" in done.stderr


def test_a_finished_run_that_is_resumed_keeps_its_measured_memory(place, tmp_path):
    assert train(place, tmp_path / "a").exit_code == 0
    before = json.loads((tmp_path / "a" / "run.json").read_text())["memory"]
    assert train(place, tmp_path / "a", "--resume").exit_code == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["memory"] == before


def test_fuse_takes_its_adapter_from_yaml_and_always_writes_its_json(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("mine", 1), ("adapters", 2)):
        assert train(place, name, "--seed", seed, "--learning-rate", 1e-3).exit_code == 0
    (tmp_path / "c.yaml").write_text(f"adapter_path: mine\nmodel: {place / 'model'}\n")
    done = run("fuse", "-c", "c.yaml", "--save-path", "one", "--json", "one.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "one.json").read_text())["path"] == "one"
    flags = ["--model", place / "model", "--adapter-path"]
    for to, adapter in (("two", "mine"), ("three", "adapters")):
        assert run("fuse", *flags, adapter, "--save-path", to).exit_code == 0
    one, two, three = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")
    )
    assert one == two != three
    refused(run("fuse", *flags, "mine", "--gguf-path", "x.gguf"), 2, "--export-gguf")


def test_cache_commands_show_verify_merge_and_export(place, tmp_path):
    ref = place / "ref"
    shown = run("cache", "info", ref, "--json", tmp_path / "info.json")
    assert re.search(r"^rows +10$", shown.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "info.json").read_text())["rows"] == 10
    verified = run("cache", "verify", ref, *usual(place), "--json", tmp_path / "v.json")
    assert verified.exit_code == 0, verified.stderr
    assert json.loads((tmp_path / "v.json").read_text())["logp_relative"] < 1e-5
    merged = run("cache", "merge", ref, ref, "--output", tmp_path / "both")
    assert re.search(r"^rows +10$", merged.stdout, re.MULTILINE), merged.output
    assert run("cache", "export", ref, "--output", tmp_path / "rows.jsonl").exit_code == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 10


def test_verifying_a_cache_of_another_model_is_refused(place):
    result = run("cache", "verify", place / "ref", *usual(place, model=place / "other"))
    refused(result, 1, "model: cache")


def test_a_cache_that_is_none_is_refused(place):
    refused(run("cache", "info", place / "data"), 1, "no reference cache", "precompute")


def test_convert_quantises_and_never_overwrites(place, tmp_path):
    flags = ["convert", "--hf-path", place / "model", "--mlx-path", tmp_path / "q4"]
    done = run(*flags, "-q", "--q-bits", 4, "--q-group-size", 32)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"model in {tmp_path / 'q4'}\n"
    config = json.loads((tmp_path / "q4" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    refused(run(*flags), 2, tmp_path / "q4", "holds a model folder", "--overwrite")
    assert [p.name for p in tmp_path.iterdir() if p.name != "user-cache"] == ["q4"]


def test_convert_of_a_model_whose_settings_lack_a_field_is_one_plain_message(place, tmp_path):
    base = shutil.copytree(place / "model", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["hidden_size"], config["vocab_size"]
    (base / "config.json").write_text(json.dumps(config))
    done = run("convert", "--hf-path", base, "--mlx-path", tmp_path / "q4")
    refused(done, 1, f"{base} cannot be converted", "missing")


@pytest.mark.parametrize("flag", ["--q-bits", "--q-group-size"])
def test_bits_without_quantising_are_refused_and_nothing_is_written(place, tmp_path, flag):
    done = run("convert", "--hf-path", place / "model", "--mlx-path", tmp_path / "q4", flag, 32)
    refused(done, 2, f"{flag} 32: nothing is quantised without --quantize")
    assert not (tmp_path / "q4").exists()


@pytest.mark.parametrize("damaged", [b"{", b"\xff\xfe", b"[]", b'{"model": 5}'])
def test_an_export_of_a_damaged_adapter_is_one_plain_message(tmp_path, damaged):
    lines(tmp_path / "adapter" / "adapter_config.json").write_bytes(damaged)
    words = ["--adapter-path", tmp_path / "adapter", "--output", tmp_path / "peft"]
    refused(run("export", *words), 1, "adapter_config.json: not an adapter configuration")


def test_doctor_says_what_is_here_without_the_network(tmp_path):
    done = run("doctor", "--no-hub", "--json", tmp_path / "machine.json")
    assert done.exit_code == 0, done.output
    topics = [finding["topic"] for finding in json.loads((tmp_path / "machine.json").read_text())]
    assert {"python", "mlx", "blas", "device", "disk"} <= set(topics)
    assert "hub" not in topics


def test_the_device_check_prints_a_line_each_writes_one_file_and_exits_by_it(tmp_path, monkeypatch):
    from fpo_mlx.pipeline import device_check
    from fpo_mlx.pipeline.device_check.lines import Line

    found = [Line("kernels", "KL", 1e-6, 1e-4), Line("speed", "FPO", 2.0, unit="s")]

    def check(*, small, show):
        for line in found:
            show(line)
        return device_check.Checked({"device": "M9"}, tuple(found), "small", False, 3.0)

    monkeypatch.setattr(device_check, "check_device", check)
    monkeypatch.chdir(tmp_path)
    done = run("doctor", "--device-check", "--small")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "ok     KL: 1e-06 (at most 0.0001)",
        "seen   FPO: 2 s",
        "M9: nothing wrong; 3 s; written to device-check.json",
        device_check.NO_GPU,
    ]
    told = json.loads((tmp_path / "device-check.json").read_text())
    assert [line["verdict"] for line in told["findings"]] == ["ok", "seen"]
    refused(run("doctor", "--device-check"), 2, "device-check.json", "--overwrite")
    found[0] = Line("kernels", "KL", 1.0, 1e-4)
    done = run("doctor", "--device-check", "--overwrite")
    assert done.exit_code == 1
    assert "1 WRONG" in done.stdout
    assert run("doctor", "--small").exit_code == 2


def test_a_json_file_that_cannot_be_written_is_an_error_without_traceback(place, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("sae", "info", place / "sae", "--json", tmp_path / "file" / "x.json")
    assert "d_in" in result.stdout  # what was found is there
    result.stdout_bytes = b""  # and is not the message
    refused(result, 1, tmp_path / "file" / "x.json", "cannot be written")
