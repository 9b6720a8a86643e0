"""A cache of other weights is measured and warned of or refused; of another template or SAE, never.

The other weights here are a quantisation of the same model: same tokenizer, same SAE.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizer
from command_line import ROWS, lines, random_sae, refused, run, train, usual

from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and what its 8-bit and 2-bit forms, another template and another SAE cached."""
    root = tmp_path_factory.mktemp("weights")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    for bits in (8, 2):
        flags = ["--hf-path", root / "model", "--mlx-path", root / f"q{bits}", "-q"]
        made = run("convert", *flags, "--q-bits", bits, "--q-group-size", 32)
        assert made.exit_code == 0, made.output
    shutil.copytree(root / "model", root / "templated")
    template = tiny_tokenizer.CHATML.replace("<|im_start|>", "<|endoftext|><|im_start|>")
    tiny_tokenizer.build_tiny_tokenizer(root / "templated", template=template)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    write_saelens(random_sae(tiny_models.HIDDEN, block=2), root / "deeper")
    lines(root / "data" / "train.jsonl", *ROWS)
    for name, changes in {
        "ref-q8": {"model": root / "q8"}, "ref-q2": {"model": root / "q2"},
        "ref-template": {"model": root / "templated"}, "ref-sae": {"sae": root / "deeper"},
    }.items():  # fmt: skip
        made = run("precompute", *usual(root, **changes), "--output", root / name)
        assert made.exit_code == 0, made.stderr
    return root


def fingerprint(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["identity"]["model"]


def gap_in(text: str) -> float:
    return float(re.findall(r"log-probs differ by up to ([\d.e-]+) nats per token", text)[0])


def test_a_near_quantisation_trains_with_a_warning_that_gives_the_measured_gap(place, tmp_path):
    done = train(place, tmp_path / "out", "--reference", place / "ref-q8", "--max-start-gap", 0.5)
    assert done.exit_code == 0, done.stderr
    assert "warning: " in done.stderr
    assert fingerprint(place / "ref-q8") in done.stderr
    assert re.search(r"\|u\| / beta is up to [\d.e-]+ nats", done.stderr)
    assert 1e-4 < gap_in(done.stderr) < 0.5


def test_a_far_quantisation_is_refused_above_the_bound_and_leaves_no_trace(place, tmp_path):
    result = train(place, tmp_path / "out", "--reference", place / "ref-q2")
    refused(result, 1, fingerprint(place / "ref-q2"), "over --max-start-gap 0.05", "precompute")
    assert gap_in(result.stderr) > 0.05
    assert not (tmp_path / "out").exists()
    allowed = train(place, tmp_path / "out", "--reference", place / "ref-q2", "--max-start-gap", 99)
    assert allowed.exit_code == 0, allowed.stderr


def test_a_cache_in_bfloat16_by_torch_is_of_the_same_weights_and_its_gap_is_said(place, tmp_path):
    pytest.importorskip("torch")
    flags = ["--backend", "torch", "--output", tmp_path / "ref"]
    words = [*usual(place), *flags, "--dtype", "bfloat16", "--tokens-per-batch", 64]
    made = run("precompute", *words)
    assert made.exit_code == 0, made.stderr
    assert json.loads((tmp_path / "ref" / "manifest.json").read_text())["identity"]["dtype"] == (
        "bfloat16"
    )
    done = train(place, tmp_path / "out", "--reference", tmp_path / "ref", "--max-start-gap", 9)
    assert done.exit_code == 0, done.stderr
    assert "made with other weights" not in done.stderr
    assert re.search(r"step 0: \|u\| / beta is off by", done.stderr)
    flags = ["--backend", "torch", "--output", tmp_path / "other", "--dtype", "int4"]
    refused(run("precompute", *usual(place), *flags), 2, "--dtype int4", "bfloat16")


@pytest.mark.parametrize(("cache", "field"), [("ref-template", "tokenizer"), ("ref-sae", "saes")])
def test_another_template_or_sae_is_refused_whatever_is_allowed(place, tmp_path, cache, field):
    result = train(place, tmp_path / "out", "--reference", place / cache, "--max-start-gap", 99)
    refused(result, 1, f"{field}: cache", "this run", "precompute")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_other_weights_is_never_written_to(place, tmp_path):
    """A row that it lacks cannot be computed with this model, so it is refused."""
    more = [*ROWS, {**ROWS[0], "prompt": "One that the cache has not seen?"}]
    data = lines(tmp_path / "more.jsonl", *more)
    before = {path.name for path in (place / "ref-q8").iterdir()}
    result = train(
        place, tmp_path / "out", "--reference", place / "ref-q8", "--max-start-gap", 99, data=data
    )
    named = f"of another model ({fingerprint(place / 'ref-q8')[:12]}) and lacks 2 of"
    refused(result, 1, named, "`fpo-mlx precompute` with that model")
    assert {path.name for path in (place / "ref-q8").iterdir()} == before
