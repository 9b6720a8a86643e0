"""`features data` on a tiny model: from the cache alone, rows with their columns, a reward."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from command_line import lines, random_sae, refused, run, usual
from judges import candidates

from fpo_mlx import cache
from fpo_mlx.errors import FpoError
from fpo_mlx.pipeline.feature_reward import read_reward
from fpo_mlx.sae import load_sae
from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")
N = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Chosen answers say "yes", rejected ones "non", all of one length; row 7 is the wrong way."""
    root = tmp_path_factory.mktemp("lessons")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(N):
        tail = " ".join(rng.choice(["so", "or", "it", "an"], size=5))
        sides = [f"yes yes {tail}", f"non non {tail}"]
        chosen, rejected = sides[::-1] if n == 7 else sides
        rows.append({"prompt": f"{n}?", "chosen": chosen, "rejected": rejected, "mine": n})
    lines(root / "data/train.jsonl", *rows)
    done = run("precompute", *usual(root), "--output", root / "ref")
    assert done.exit_code == 0, done.stderr
    return root


def told(place, *words):
    done = run("features", "data", *usual(place), "--reference", place / "ref", *words)
    assert done.exit_code == 0, done.stderr
    return done


def test_from_the_cache_alone_the_lesson_is_learned_and_the_wrong_row_named(
    place, tmp_path, monkeypatch
):
    def no_model(*_, **__):
        raise AssertionError("a model pass")

    monkeypatch.setattr("fpo_mlx.pipeline.store.open_engine", no_model)
    monkeypatch.setattr("fpo_mlx.model.open.open_model", no_model)
    lines(tmp_path / "labels.json", {str(i): f"label {i}" for i in range(48)})
    out = tmp_path / "out.json"
    words = ["--json", out, "--csv", tmp_path / "out.csv", "--labels", tmp_path / "labels.json"]
    done = told(place, *words)
    report = json.loads(out.read_text())
    assert (report["kind"], report["version"], report["pairs"]) == ("features data", 1, N)
    by_name = {p["name"]: p for p in report["predictors"]}
    assert by_name["features"]["accuracy"] == by_name["bag of words"]["accuracy"] == (N - 1) / N
    assert by_name["length"]["accuracy"] < 0.65
    assert report["against"][0]["where"] == "train.jsonl:8"
    first = report["features"][0]
    assert first["q"] < 0.001
    assert first["label"] == f"label {first['feature']}"
    assert "your pairs reward: " in done.stdout
    assert f"label {first['feature']} ({'+' if first['z'] > 0 else '−'})" in done.stdout
    assert "train.jsonl:8: its label has a probability of 0." in done.stdout
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + len(report["features"])


def test_differences_are_those_of_the_cache(place, tmp_path):
    """The win rate of the first feature, counted again from the cache's own rows."""
    out = tmp_path / "out.json"
    told(place, "--json", out)
    first = json.loads(out.read_text())["features"][0]
    store = cache.open_cache(place / "ref", cache.read_identity(place / "ref"))
    dense = {key: store.get(key).features[0].to_dense(48) for key in list(store.keys())}
    from fpo_mlx.config import load_config
    from fpo_mlx.pipeline import open_job, read_pairs

    config = load_config(
        {"model": str(place / "model"), "sae": (str(place / "sae"),), "data": str(place / "data")}
    )
    job = open_job(config, say=print, need_sae=True)
    moved = [
        dense[pair.keys[0]][first["feature"]] - dense[pair.keys[1]][first["feature"]]
        for pair in read_pairs(job, "train", print)
    ]
    differs = [m for m in moved if m]
    assert first["differs"] == len(differs)
    assert first["win_rate"] == pytest.approx(np.mean([m > 0 for m in differs]))


def test_a_covering_subset_and_what_is_left_of_the_rows_keep_all_columns(place, tmp_path):
    done = told(place, "--select", 12, "--output", tmp_path / "some")
    rows = [json.loads(line) for line in (tmp_path / "some/train.jsonl").read_text().splitlines()]
    assert f"12 rows in {tmp_path / 'some'}" in done.stdout
    assert len(rows) == len({row["mine"] for row in rows}) == 12
    given = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()]
    assert all(row in given for row in rows)
    told(place, "--drop-against", "--output", tmp_path / "clean")
    clean = [json.loads(line) for line in (tmp_path / "clean/train.jsonl").read_text().splitlines()]
    assert 7 not in {row["mine"] for row in clean}
    assert len(clean) >= N - 3


def test_a_set_of_which_no_row_is_left_is_not_written_and_one_beside_it_is_told(place, tmp_path):
    out = tmp_path / "some"
    lines(out / "valid.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    both = ("--drop-against", "--output", out, "--overwrite")
    done = told(place, *both)
    assert f"{out} holds valid.jsonl of another time as well" in done.stderr
    before = (out / "train.jsonl").read_bytes()
    usually = ("features", "data", *usual(place), "--reference", place / "ref", *both)
    for more in ((), ("--select", 5)):
        done = run(*usually, *more, "--against", 1.0)
        assert done.exit_code == 3
        assert "leaves no row at --against 1" in done.stderr
        assert f"{out} was not written" in done.stderr
        assert "your pairs reward" in done.stdout
        assert (out / "train.jsonl").read_bytes() == before


def test_what_a_share_holds_back_stands_beside_the_chosen_rows(place, tmp_path):
    """It was dropped, and the same share then split the chosen rows anew."""
    share = ("--valid-share", 0.2)
    done = told(place, *share, "--drop-against", "--output", tmp_path / "clean")
    train, valid = (
        [
            json.loads(line)["mine"]
            for line in (tmp_path / f"clean/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "valid")
    )
    assert f"has the {len(valid)} rows of valid as they are" in done.stderr
    assert 2 < len(valid) < N / 2
    assert N - 5 < len({*train, *valid}) == len(train) + len(valid) < N
    again = told(place, *share, "--select", 9, "--output", tmp_path / "clean", "--overwrite")
    assert "holds valid.jsonl of another time" in again.stderr


def test_rows_that_cannot_be_written_cost_nothing_else(place, tmp_path, monkeypatch):
    """The whole report was lost, on the terminal and in its files."""

    def full(*_):
        raise FpoError("the disk is full")

    monkeypatch.setattr("fpo_mlx.data.write_clean", full)
    out = {name: tmp_path / name for name in ("r.json", "r.csv", "reward.json")}
    done = run(
        "features", "data", *usual(place), "--reference", place / "ref", "--drop-against",
        "--output", tmp_path / "some", "--json", out["r.json"], "--csv", out["r.csv"],
        "--save-reward", out["reward.json"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "the disk is full" in done.stderr
    assert "your pairs reward" in done.stdout
    assert json.loads(out["r.json"].read_text())["written"] is None
    assert all(path.stat().st_size for path in out.values())


def test_the_model_reads_the_examples_when_it_is_asked_for_contexts(place, tmp_path):
    out = tmp_path / "out.json"
    done = told(place, "--contexts", "--examples", 1, "--top", 2, "--json", out)
    first = json.loads(out.read_text())["features"][0]
    assert len(first["contexts"]) == 1
    assert "«" in first["contexts"][0]["text"]
    assert "«" in done.stdout


def test_the_regression_is_kept_with_what_reading_by_it_needs(place, tmp_path):
    told(place, "--save-reward", tmp_path / "reward.json")
    reward = read_reward(tmp_path / "reward.json")
    assert reward.pairs == N
    assert reward.held_out_accuracy == (N - 1) / N
    assert reward.saes[0][2:] == (1, "resid_post")
    store = cache.read_identity(place / "ref")
    assert reward.model_fingerprint == store.model
    assert reward.saes[0][1] == store.saes[0][0]


def test_a_reward_names_a_model_of_the_hub_as_it_was_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr("fpo_mlx.pipeline.job.resolve_model", lambda _: place / "model")
    words = usual(place, model="owner/name", reference=place / "ref")
    done = run("features", "data", *words, "--save-reward", tmp_path / "reward.json")
    assert done.exit_code == 0, done.stderr
    assert read_reward(tmp_path / "reward.json").model == "owner/name"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--select", "5"], ["--output FOLDER"]),
        (["--output", "new"], ["--select N or --drop-against"]),
        (["--limit", "12"], ["12 pairs of 12 prompts; wanted 20"]),
        (
            ["--limit", "30", "--select", "5", "--output", "new"],
            ["--limit 30 with --output new", "Leave --limit out"],
        ),
        (
            ["--save-reward", "r.json", "--chat-template-args", '{"a": 1}', "--allow-pickle"],
            ["--save-reward with --chat-template-args, --allow-pickle"],
        ),
        (["--save-reward", "r.json", "--init-adapter", "sft"], ["Fuse the adapter"]),
    ],
)
def test_what_cannot_be_done_is_said(place, words, parts):
    done = run("features", "data", *usual(place), "--reference", place / "ref", *words)
    refused(done, 3 if "12" in words else 2, *parts)


def test_rows_that_were_too_long_to_look_at_are_said_to_be_missing_in_what_is_written(
    place, tmp_path
):
    rows = (place / "data/train.jsonl").read_text()
    long = {"prompt": "so " * 80, "chosen": "yes", "rejected": "non"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(rows + json.dumps(long) + "\n")
    data = usual(place, data=tmp_path / "data")
    words = ["--max-seq-length", 60, "--reference", tmp_path / "ref", "--output", tmp_path / "some"]
    done = run("features", "data", *data, *words, "--select", 9)
    assert done.exit_code == 0, done.stderr
    assert f"too long to be looked at, so not in {tmp_path / 'some'}: 1 of 61 rows" in done.stderr


def test_answers_are_judged_by_the_regression_and_the_features_that_decided_are_said(
    place, tmp_path
):
    told(place, "--save-reward", tmp_path / "reward.json")
    source = candidates(
        tmp_path / "c.jsonl",
        {f"{n}?": ["no or so", "yes yes so or it an so", "non non so or it an so"] for n in (1, 2)},
    )
    out = tmp_path / "v.jsonl"
    words = [source, "--reward", tmp_path / "reward.json", "--output", out]
    done = run("pairs", "judge", *words)
    assert done.exit_code == 0, done.stderr
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(v["id"], v["a"], v["b"]): v for v in verdicts}
    reward = read_reward(tmp_path / "reward.json")
    for v in verdicts:
        assert v["judge"].startswith("features:")
        assert v["p"] == pytest.approx(1 / (1 + np.exp(v["score_b"] - v["score_a"])))
        assert re.match(r"\d+ \(.*?\) [+-]|\d+ [+-]", v["raw"])
    yes = [v for (_, a, b), v in found.items() if (a, b) == (1, 2)]
    assert yes
    assert all(v["verdict"] == "a" and v["p"] > 0.5 for v in yes)
    assert "0 verdicts" in run("pairs", "judge", *words).stdout
    other = json.loads((tmp_path / "reward.json").read_text()) | {"model_fingerprint": "0" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    words = [source, "--reward", tmp_path / "other.json", "--output", tmp_path / "w.jsonl"]
    refused(run("pairs", "judge", *words), 1, "another model", reward.model_fingerprint)


def test_a_regression_on_another_saes_features_is_refused(place, tmp_path):
    """Under the same name lies another SAE than the one whose features the weights are of."""
    told(place, "--save-reward", tmp_path / "reward.json")
    record = json.loads((tmp_path / "reward.json").read_text())
    sae = load_sae(place / "sae")
    write_saelens(replace(sae, b_enc=sae.b_enc + 0.5), tmp_path / "sae")
    record["saes"][0][0] = str(tmp_path / "sae")
    (tmp_path / "other.json").write_text(json.dumps(record))
    source = candidates(tmp_path / "c.jsonl", {"1?": ["yes", "no or so"]})
    words = [source, "--reward", tmp_path / "other.json", "--output", tmp_path / "v.jsonl"]
    refused(run("pairs", "judge", *words), 1, "another SAE", record["saes"][0][1])
