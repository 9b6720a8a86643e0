"""Adapters are judged by the objective of their training, where the user names none."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from command_line import refused, run, usual  # noqa: E402
from evaluated import K, own_cache, place  # noqa: E402, F401

from fpo_mlx.config import load_config  # noqa: E402
from fpo_mlx.pipeline.measure import as_trained  # noqa: E402

SUMS, MEANS = "log-probs summed over a response", "log-probs per token"


def trained(place, folder, source="one", **settings):
    """An adapter whose run.json says these settings, all others at their defaults."""
    shutil.copytree(place / source, folder)
    known = load_config(settings).as_dict()
    (folder / "run.json").write_text(json.dumps({"settings": known}))
    return folder


def judge(place, out, *words, sae=True):
    flags = ["--split", "valid", "--top-k", K, "--samples", 0, "--json", out, "--overwrite"]
    where = usual(place) if sae else usual(place, sae=None)
    done = run("evaluate", *where, *flags, *words)
    assert done.exit_code == 0, done.stderr
    return json.loads(out.read_text()), done.stderr


def margins(found) -> np.ndarray:
    """Of sums over the responses, by the log-probs of the same file."""
    gains = [[pair[s]["logp"] - pair[s]["ref_logp"] for s in ("chosen", "rejected")]
             for pair in found["pairs"]]  # fmt: skip
    return np.array([chosen - rejected for chosen, rejected in gains])


@pytest.mark.parametrize("preset", ["dpo", "tdpo2"])
def test_an_adapter_of_sums_is_judged_by_sums(place, tmp_path, preset):
    """It was judged by means per token, FPO's measure, where --objective was not repeated."""
    path = trained(place, tmp_path / "a", objective=preset, beta=0.3)
    words = ["--adapter-path", path]
    got, said = judge(place, tmp_path / "e.json", *words)
    assert f"judged as {path} was trained, by {preset} ({SUMS}, beta 0.3)" in said
    assert "--objective names another" in said
    assert got["summary"]["rewards/margins"] == pytest.approx(0.3 * margins(got).mean(), rel=1e-3)
    named, _ = judge(place, tmp_path / "n.json", *words, "--objective", preset, "--beta", 0.3)
    assert got == named
    assert "features/chosen" in got["summary"]  # an SAE that was given is looked at all the same


@pytest.mark.parametrize("words", [("--objective", "fpo"), ("-c", "run.yaml")])
def test_an_objective_that_the_user_names_stands_and_one_of_a_file_is_named(
    place, tmp_path, monkeypatch, words
):
    """One run.yaml was given for both of `--adapter-path fpo/ --adapter-path dpo/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("objective: fpo\nbeta: 0.1\n")
    path = trained(place, tmp_path / "a", objective="dpo", beta=0.5)
    own = trained(place, tmp_path / "b", "two", objective="fpo")
    both = ["--adapter-path", own, "--adapter-path", path]
    got, said = judge(place, tmp_path / "e.json", *both, *words)
    told = f"judged by fpo ({MEANS}, beta 0.1), which the file of -c names; trained by other "
    told += f"rewards: {path} by dpo ({SUMS}, beta 0.5); --objective names another"
    assert (told in said) is (words[0] == "-c")
    assert ("judged" in said) is (words[0] == "-c")
    assert got["objective"]["preset"] == "fpo"
    assert got["objective"]["length_normalize"] is True


def test_single_settings_that_the_user_gives_stand_over_those_of_the_training(place, tmp_path):
    path = trained(place, tmp_path / "a", objective="tdpo2", beta=0.3, top_k=7)
    got, _ = judge(place, tmp_path / "e.json", "--adapter-path", path, "--beta", 0.2)
    o = got["objective"]
    assert (o["preset"], o["beta"], o["top_k"], o["constraint"]) == ("tdpo2", 0.2, K, "kl")


@pytest.mark.parametrize(("settings", "words", "sae", "constraint"), [
    ({"objective": "fpo", "beta": 0.3}, (), False, "features"),
    ({"objective": "fpo", "constraint": "activations", "beta": 0.3}, (), False, "none"),
    ({"objective": "fpo", "constraint": "activations", "target_drift": 0.2}, (), True, "none"),
    ({"objective": "fpo", "target_drift": 0.2}, ("--constraint", "none"), True, "none"),
    ({"objective": "tdpo2", "target_kl": 3.0}, ("--no-kl",), False, "none"),
    ({"objective": "dpo"}, (), True, "none"),
    ({"objective": "dpo", "score_margin": 0.5}, (), False, "none"),
    ({"objective": "fpo", "feature_weights": "gone.json", "beta": 0.3}, (), False, "features"),
])  # fmt: skip
def test_nothing_more_is_needed_than_the_command_was_given(
    place, tmp_path, settings, words, sae, constraint
):
    """No SAE, no block, no pass for the KL, no file of the training's folder, no scores."""
    path = trained(place, tmp_path / "a", **settings)
    got, _ = judge(place, tmp_path / "e.json", "--adapter-path", path, *words, sae=sae)
    assert got["objective"]["constraint"] == constraint
    assert ("features/chosen" in got["summary"]) is sae
    assert ("kl/chosen" in got["summary"]) is ("--no-kl" not in words)
    assert got["objective"]["feature_weights"] is None
    assert got["objective"]["score_margin"] == 0


@pytest.mark.parametrize("target", [{"target_drift": 0.2}, {"constraint": "kl", "target_kl": 3.0}])
def test_an_alpha_that_the_user_gives_takes_the_place_of_a_target(place, tmp_path, target):
    """The target of the training won, and with it an alpha of 0."""
    path = trained(place, tmp_path / "a", objective="fpo", **target)
    got, _ = judge(place, tmp_path / "e.json", "--adapter-path", path, "--alpha", 2)
    o = got["objective"]
    assert (o["alpha"], o["target_drift"], o["target_kl"]) == (2, None, None)
    assert o["constraint"] == target.get("constraint", "features")


def test_adapters_of_other_rewards_are_judged_by_one_measure_that_is_named(place, tmp_path):
    one = trained(place, tmp_path / "a", objective="dpo")
    two = trained(place, tmp_path / "b", "two", objective="fpo")
    both = ["--adapter-path", one, "--adapter-path", two]
    got, said = judge(place, tmp_path / "e.json", *both)
    assert f"{one}: dpo ({SUMS}, beta 0.1); {two}: fpo ({MEANS}, beta 0.1)" in said
    assert f"all are judged by fpo ({MEANS}, beta 0.1); --objective names another" in said
    assert got["objective"]["preset"] == "fpo"
    three = trained(place, tmp_path / "c", "two", objective="tdpo2")
    got, said = judge(place, tmp_path / "e.json", *both[:2], "--adapter-path", three)
    assert f"judged as {one} was trained, by dpo ({SUMS}, beta 0.1) (loss and u are" in said
    assert got["objective"]["length_normalize"] is False


def test_an_adapter_that_says_no_objective_counts_beside_others_as_of_the_settings(place, tmp_path):
    one = trained(place, tmp_path / "a", objective="dpo")
    both = ["--adapter-path", one, "--adapter-path", place / "two"]
    got, said = judge(place, tmp_path / "e.json", *both)
    assert f"{one}: dpo ({SUMS}, beta 0.1); {place / 'two'}: says none" in said
    assert f"all are judged by fpo ({MEANS}, beta 0.1)" in said
    assert got["objective"]["preset"] == "fpo"
    same = ["--no-length-normalize", "--constraint", "none"]
    got, said = judge(place, tmp_path / "e.json", *both, *same)
    assert f"judged as {one} was trained, by dpo" in said
    assert got["objective"]["preset"] == "dpo"


@pytest.mark.parametrize("record", [{}, {"settings": {"seed": 1}}, {"settings": [1]}])
def test_an_adapter_that_says_no_objective_is_judged_as_before(place, tmp_path, record):
    path = tmp_path / "a"
    shutil.copytree(place / "one", path)
    (path / "run.json").write_text(json.dumps(record))
    got, said = judge(place, tmp_path / "e.json", "--adapter-path", path)
    assert "judged" not in said
    assert got["objective"]["preset"] == "fpo"


@pytest.mark.parametrize("broken", [{"objective": "later"}, {"objective": "dpo", "beta": "x"}])
def test_an_objective_that_cannot_be_read_is_left_with_a_warning(place, tmp_path, broken):
    path = trained(place, tmp_path / "a")
    (path / "run.json").write_text(json.dumps({"settings": broken}))
    got, said = judge(place, tmp_path / "e.json", "--adapter-path", path)
    assert f"warning: {path}: the objective in its run.json is not used: --" in said
    assert got["objective"]["preset"] == "fpo"


def test_the_best_of_a_run_is_judged_as_the_run(place, tmp_path):
    path = trained(place, tmp_path / "a", objective="dpo")
    shutil.copytree(place / "one", path / "best")
    said: list[str] = []
    found = as_trained(load_config({}), [str(path / "best")], said.append)
    assert (found.preset, found.objective.length_normalize) == ("dpo", False)
    assert len(said) == 1


def test_a_fused_folder_is_compared_by_the_measure_of_the_training(place, tmp_path):
    path = trained(place, tmp_path / "a", objective="dpo")
    written = ["--save-path", tmp_path / "fused", "--json", tmp_path / "f.json"]
    flags = ["--adapter-path", path, "--verify", place / "data", *written]
    done = run("fuse", "--model", place / "model", *flags)
    assert done.exit_code == 0, done.stderr
    assert f"judged as {path} was trained, by dpo ({SUMS}" in done.stderr
    got, _ = judge(place, tmp_path / "e.json", "--adapter-path", path)
    found = json.loads((tmp_path / "f.json").read_text())
    for side in ("before", "after"):
        wanted = pytest.approx(got["summary"]["rewards/margins"], rel=1e-3)
        assert found[side]["rewards/margins"] == wanted


def test_pairs_that_cannot_be_read_are_refused_before_anything_is_fused(place, tmp_path):
    """Its user had a fused folder and an error, for a margin that the pairs have no scores for."""
    (tmp_path / "run.yaml").write_text("score_margin: 0.5\n")
    words = ["--adapter-path", place / "one", "--save-path", tmp_path / "fused"]
    more = ["--verify", place / "data", "-c", tmp_path / "run.yaml"]
    refused(run("fuse", "--model", place / "model", *words, *more), 3, "no 'score_chosen'")
    assert not (tmp_path / "fused").exists()
