"""scripts/studies/pairs_end_to_end.py on a tiny model: all parts, once each; sums by hand."""

from __future__ import annotations

import json

import frontier_rewards
import pairs_end_to_end as study
import pytest
import tiny_models
from command_line import BLOCK, random_sae

pytest.importorskip("mlx.core")

from fpo_mlx.errors import Diverged  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402


def test_the_studies_prompts_are_those_of_the_frontier_and_held_out_things_are_apart():
    assert frontier_rewards.ALL == study.ALL
    assert len(set(study.ALL)) == len(study.ALL) == 82
    o = study.parse(["--model", "m", "--work", "w"])
    assert o.prompts <= len(study.ALL[: -study.HELD_OUT]) * len(study.FORMS)


def test_every_part_is_made_once_and_a_second_start_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "TOKENS", 5)
    monkeypatch.setattr(study, "TRAIN", {**study.TRAIN, "top_k": 5})
    letters = lambda prompt, answer: len(answer) / 40  # noqa: E731  a random model says no words
    monkeypatch.setattr(study, "sentiment", letters)
    monkeypatch.setattr(study, "REWARD", "plainness")
    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN, BLOCK), tmp_path / "sae")
    words = [f"--{name}={tmp_path / name}" for name in ("model", "sae", "work", "output")]
    words += ["--prompts=6", "--held-out=3", "--seeds=1"]
    assert study.main(words) == 0
    found = json.loads((tmp_path / "output.json").read_text())
    assert [(r["part"], r["seed"]) for r in found["records"]] == [(part, 1) for part in study.PARTS]
    rows = {row["what"]: row for row in found["summary"]}
    assert len(rows) == 5
    assert rows["two against one"]["from"] == rows["one: after against before"]["to"]
    before = (tmp_path / "output.json").read_bytes()
    monkeypatch.setattr(study, "RUN", {})  # a part that ran again would not be found
    assert study.main(words) == 0
    assert (tmp_path / "output.json").read_bytes() == before


def test_a_training_that_the_guard_stops_is_judged_where_it_was_left_and_named(
    tmp_path, monkeypatch
):
    folder = tmp_path / "seed-1"

    def train(config, say):
        kept = folder / "adapters-pairs"
        kept.mkdir(parents=True)
        (kept / "adapters.safetensors").touch()
        raise Diverged("iteration 67: the margin is 70.8")
        yield

    monkeypatch.setattr("fpo_mlx.pipeline.precompute", lambda *_, **__: None)
    monkeypatch.setattr("fpo_mlx.pipeline.train", train)
    monkeypatch.setattr(study, "about", lambda pairs: {"pairs": 9})
    monkeypatch.setattr(study, "held", lambda o, out, taken, seed: side(0.5, 0.7))
    o = study.parse(["--model", "m", "--sae", "s", "--work", str(tmp_path)])
    adapter = study.tune(o, folder, tmp_path / "pairs", 1)
    assert (adapter / study.STOPPED).read_text() == "iteration 67: the margin is 70.8\n"
    record = study.before_and_after(o, "two", 1, tmp_path / "pairs", adapter)
    row = study.compare("two", {1: record, 2: {**record, "stopped": False}}, "before", "after")
    assert row
    assert row["stopped"] == [1]
    assert study.markdown([row]).splitlines()[-1].endswith("| 1 |")


def side(*reward):
    return {"reward": list(reward), "tokens": 3.0, "cut": 0.0, "different": 1.0}


def test_a_gain_is_the_mean_over_seeds_and_its_interval_that_over_both_by_hand():
    row = study.compare(
        "x", {0: {"a": side(0.0, 0.5), "b": side(1.0, 0.5)},
              1: {"a": side(0.0, 0.5), "b": side(0.5, 1.0)}}, "a", "b",
    )  # fmt: skip
    assert (row["from"], row["to"], row["gain"]) == (0.25, 0.75, 0.5)
    assert row["of seeds"] == [0.5, 0.5]
    assert row["interval"] == [0.0, 1.0]  # gains 1, 0 of one seed, .5, .5 of the other
    assert row["t"] == [0.5, 0.5]
    assert study.compare("x", {}, "a", "b") is None
    assert "+0.500 [+0.000, +1.000] | [+0.500, +0.500] |" in study.markdown([row])
