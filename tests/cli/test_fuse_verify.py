"""`fuse` before it fuses and after: what it warns of, and what --verify compares."""

from __future__ import annotations

import importlib
import json
import re
import shutil

import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from command_line import ROWS, lines, refused, run  # noqa: E402
from evaluated import K, adapter, own_cache, place  # noqa: E402, F401
from quantised import quantised  # noqa: E402

from fpo_mlx.data import data_fingerprint, read_split  # noqa: E402
from fpo_mlx.data.tokenize import tokenize_row  # noqa: E402
from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.reference.weights import model_fingerprint  # noqa: E402


def fuse(place, out, *words, adapter="one"):
    folder = adapter if hasattr(adapter, "joinpath") else place / adapter
    return run("fuse", "--model", place / "model", "--adapter-path", folder, "--save-path",
               out / "fused", *words)  # fmt: skip


def trained(place, folder, **record):
    """The adapter of a run: what it says of its start lies in the folder of the run."""
    shutil.copytree(place / "one", folder)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_fused_folder_is_judged_as_it_is_whatever_adapter_training_began_from(place, tmp_path):
    """The SFT adapter was put onto the fused folder a second time."""
    (tmp_path / "run.yaml").write_text(json.dumps({"init_adapter": str(place / "two")}))
    done = fuse(place, tmp_path, "-c", tmp_path / "run.yaml", "--verify", place / "data",
                "--json", tmp_path / "f.json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    for name, before in found["before"].items():
        assert found["after"][name] == pytest.approx(before, abs=1e-4), name
    assert abs(found["before"]["logps_per_token/chosen_change"]) > 1e-3  # the two do differ


def test_fuse_warns_of_an_adapter_of_another_model(place, tmp_path):
    said = "was made on other weights of that name"
    own = trained(
        place, tmp_path / "own", fingerprints={"model": model_fingerprint(place / "model")}
    )
    assert said not in fuse(place, tmp_path, adapter=own).stderr
    other = trained(place, tmp_path / "other", fingerprints={"model": "0" * 64})
    assert said in fuse(place, tmp_path / "b", adapter=other).stderr


def test_fuse_takes_variables_of_the_template_and_names_those_of_the_training(place, tmp_path):
    folder = trained(place, tmp_path / "own", settings={"chat_template_args": {"shout": True}})
    said = """give '{"shout": true}' to ask as in training"""
    verify = ("--verify", place / "data")
    assert said not in fuse(place, tmp_path / "a", adapter=folder).stderr  # nothing is asked
    assert said in fuse(place, tmp_path / "b", *verify, adapter=folder).stderr
    given = ("--chat-template-args", '{"shout": true}')
    done = fuse(place, tmp_path / "c", *verify, *given, adapter=folder)
    assert done.exit_code == 0, done.stderr
    assert said not in done.stderr


def test_fuse_says_on_which_split_it_measures_and_whether_the_adapter_knows_its_pairs(
    place, tmp_path
):
    """Of a folder without held-out pairs it took those of the training, without a word."""
    rows = [tokenize_row(row, load_tokenizer(place / "model"))
            for row in read_split(place / "data", "valid")]  # fmt: skip
    own = trained(place, tmp_path / "own", fingerprints={"data": data_fingerprint(rows)})
    (tmp_path / "pairs").mkdir()
    for split, known in (("train", True), ("valid", True), ("test", False)):
        shutil.copy(place / "data" / "valid.jsonl", tmp_path / "pairs" / f"{split}.jsonl")
        if not known:
            lines(tmp_path / "pairs" / f"{split}.jsonl", *ROWS[:3])
        done = fuse(place, tmp_path / split, "--verify", tmp_path / "pairs", adapter=own)
        assert done.exit_code == 0, done.stderr
        assert f"{4 if known else 3} pairs of the {split} split" in done.stderr
        assert ("was trained on these very pairs" in done.stderr) is known


@pytest.mark.parametrize("kind", ["kl", "drift"])
def test_held_out_pairs_are_opened_once(place, tmp_path, monkeypatch, kind):
    module, opened = importlib.import_module("fpo_mlx.pipeline.fuse"), []
    read = module.read_pairs
    monkeypatch.setattr(module, "read_pairs", lambda *a: opened.append(1) or read(*a))
    (tmp_path / "run.yaml").write_text(json.dumps({"top_k": K}))
    done = fuse(place, tmp_path, "-c", tmp_path / "run.yaml", "--verify", place / "data", "--sae",
                place / "sae", f"--target-{kind}", 1000)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert opened == [1]
    assert re.search(r"rewards/margins +\S+ -> \S+", done.stdout)


def test_fuse_of_a_4_bit_base_says_what_its_8_bits_add_and_base_leaves_them_out(place, tmp_path):
    wide = tiny_models.tiny_llama(tmp_path / "wide", tokenizer=True, intermediate_size=64)
    folder = quantised(wide, tmp_path / "four")
    (tmp_path / "own").mkdir()
    adapter(tmp_path / "own", folder, 0)
    words = ("--json", tmp_path / "f.json", "--overwrite")
    found = {}
    for bits in (None, "base"):
        more = ("--keep-bits", bits) if bits else ()
        done = run("fuse", "--model", folder, "--adapter-path", tmp_path / "own", "--save-path",
                   tmp_path / "fused", *words, *more)  # fmt: skip
        assert done.exit_code == 0, done.stderr
        said = "4 layers with adapters are kept at 8 bits, where the base has 4" in done.stderr
        assert said is (bits is None)
        found[bits] = json.loads((tmp_path / "f.json").read_text())
    raised = found[None]["raised"]
    assert (raised["layers"], raised["bits"], raised["base_bits"]) == (4, 8, [4])
    assert raised["added"] > 0
    assert "raised" not in found["base"]
    assert found[None]["rounding"]["error"] < found["base"]["rounding"]["error"] / 8


@pytest.mark.parametrize(("words", "part"), [
    (("--dequantize", "--keep-bits", "base"), "exclude each other"),
    (("--keep-bits", 8), "this model is not quantised"),
    (("--keep-bits", 7), "'base', '5', '6', '8'"),
])  # fmt: skip
def test_bits_that_cannot_be_had_are_refused(place, tmp_path, words, part):
    refused(fuse(place, tmp_path, *words), 2, part)
    assert not (tmp_path / "fused").exists()
