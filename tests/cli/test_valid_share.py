"""`--valid-share` through the commands: one set of prompts is held back by all of them."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import tiny_models
from command_line import lines, refused, run, train, usual

from fpo_mlx.intervals import share_to_hold

pytest.importorskip("mlx.core")

ROWS = [
    {"prompt": f"Question {n // 2}?", "chosen": f"It is {n}.", "rejected": f"Well, {n} …"}
    for n in range(20)
]
SHARE = ("--valid-share", 0.2)  # 3 of the 10 prompts, by their hashes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("share")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    lines(root / "pairs.jsonl", *ROWS)
    lines(root / "split" / "train.jsonl", *ROWS)
    lines(root / "split" / "valid.jsonl", ROWS[0])
    return root


@pytest.fixture(autouse=True)
def own_cache(place, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(place / "user-cache"))


def dpo(place, out, *words, data="pairs.jsonl"):
    return train(place, out, "--objective", "dpo", *words, sae=None, data=place / data)


def test_a_run_trains_on_what_is_left_and_every_command_sees_the_same(place, tmp_path):
    done = dpo(place, tmp_path / "out", *SHARE, "--iters", 16)
    assert done.exit_code == 0, done.stderr
    assert "on 14 pairs, 16 iterations of 1 = 1.14 passes\n" in done.stderr
    assert "passes over" not in done.stderr
    assert "nothing is held out" not in done.stderr
    assert "On 6 held-out pairs before -> after 16 iterations:" in done.stderr
    (line,) = re.findall(r"fpo-mlx evaluate .*", done.stderr)
    assert "--valid-share 0.2" in line
    assert "--split valid" in line
    told = run(*shlex.split(line)[1:], "--samples", 0)
    assert told.exit_code == 0, told.stderr
    words = usual(place, sae=None, data=place / "pairs.jsonl")
    judge = ["evaluate", *words, *SHARE, "--adapter-path", tmp_path / "out", "--samples", 0]
    judged = run(*judge, "--split", "valid", "--json", tmp_path / "scores.json")
    assert judged.exit_code == 0, judged.stderr
    assert "scoring" not in judged.stderr  # the run has scored these very pairs
    refused(run(*judge), 1, "no test split", "--split valid")
    checked = run("check", *words, *SHARE, "--json", tmp_path / "check.json")
    assert checked.exit_code == 0, checked.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert {name: split["rows"] for name, split in found["splits"].items()} == {
        "train": 14, "valid": 6,
    }  # fmt: skip
    assert "leakage" not in found["kinds"]
    made = run("precompute", *words, *SHARE, "--objective", "dpo", "--output", tmp_path / "ref")
    assert "scoring 20 of 20 pairs" in made.stderr


@pytest.mark.parametrize(
    ("pairs", "share"),
    [(20, 0.2), (400, 0.2), (500, 0.1), (999, 0.1), (1000, 0.05), (60_000, 0.05)],
)
def test_the_share_that_is_advised_holds_fifty_pairs_back_or_a_fifth(pairs, share):
    assert share_to_hold(pairs) == share


@pytest.mark.parametrize(("there", "here", "said"), [
    (0.2, None, "Give --valid-share 0.2 --split valid here, too"),
    (0.2, 0.4, "Give --valid-share 0.2 --split valid here, too"),
    (None, 0.2, "nothing held back"), (0.2, 0.2, None), (0.4, 0.2, None),
])  # fmt: skip
def test_pairs_that_another_share_trained_on_are_named(place, tmp_path, there, here, said):
    """By the fingerprint of all pairs together they were others; those of less lie within more."""
    flags = [("--valid-share", share) if share else () for share in (there, here)]
    assert dpo(place, tmp_path / "out", *flags[0]).exit_code == 0
    words = usual(place, sae=None, data=place / "pairs.jsonl")
    words += ["--adapter-path", tmp_path / "out", "--samples", 0, "--split", "valid", *flags[1]]
    judged = run("evaluate", *words, "--json", tmp_path / "scores.json")
    assert judged.exit_code == 0, judged.stderr
    assert ("it has seen" in judged.stderr) is (said is not None)
    assert (said or "") in judged.stderr
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found.get("trained_on", False) is (said is not None)


def test_a_file_that_bears_another_name_is_the_one_that_was_trained_on(place, tmp_path):
    assert dpo(place, tmp_path / "out", *SHARE).exit_code == 0
    (tmp_path / "other.jsonl").hardlink_to(place / "pairs.jsonl")
    words = usual(place, sae=None, data=tmp_path / "other.jsonl")
    words += ["--adapter-path", tmp_path / "out", "--samples", 0, "--split", "valid"]
    assert "it has seen most of these pairs" in run("evaluate", *words).stderr


def test_fuse_verifies_on_what_the_share_has_held_back(place, tmp_path):
    assert dpo(place, tmp_path / "out", *SHARE).exit_code == 0
    words = ["fuse", "--model", place / "model", "--adapter-path", tmp_path / "out"]
    words += ["--save-path", tmp_path / "fused", "--verify", place / "pairs.jsonl", "--overwrite"]
    done = run(*words, *SHARE)
    assert done.exit_code == 0, done.stderr
    assert "on its 6 pairs of the valid split" in done.stderr
    assert "it has seen most" not in done.stderr
    whole = run(*words)
    assert "on its 20 pairs of the train split" in whole.stderr
    assert "it has seen most of these pairs. Give --valid-share 0.2 here, too" in whole.stderr
    assert "--split" not in whole.stderr  # fuse has none


@pytest.mark.parametrize("other", ["others.jsonl", "split"])
def test_a_share_of_a_yaml_file_is_none_of_other_data_and_a_flag_is(place, tmp_path, other):
    """It took a fifth of held-out pairs, and refused a folder that has a validation split."""
    lines(place / "others.jsonl", *ROWS)
    yaml = {"data": str(place / "pairs.jsonl"), "model": str(place / "model"), "valid_share": 0.2}
    lines(tmp_path / "run.yaml", yaml | {"objective": "dpo", "iters": 1})
    own = ("-c", tmp_path / "run.yaml")
    assert run("train", *own, "--adapter-path", tmp_path / "out").exit_code == 0
    words = (*own, "--adapter-path", tmp_path / "out")
    fused = ("--save-path", tmp_path / "fused", "--overwrite")
    judged = run("evaluate", *words, "--data", place / other, "--split", "train", "--samples", 0)
    assert judged.exit_code == 0, judged.stderr
    assert "is of its own data" in judged.stderr
    verify = ["fuse", *words, *fused, "--verify", place / other]
    whole = "20 pairs of the train" if other == "others.jsonl" else "1 pairs of the valid"
    assert f"on its {whole} split" in run(*verify).stderr
    if other == "others.jsonl":
        assert "pairs of the valid split" in run(*verify, *SHARE).stderr
    again = run("fuse", *words, *fused, "--verify", place / "pairs.jsonl")
    assert "pairs of the valid split" in again.stderr


def test_a_test_split_is_the_same_under_every_share(place, tmp_path):
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    lines(tmp_path / "data" / "test.jsonl", {**ROWS[0], "prompt": "Another?"})
    done = dpo(place, tmp_path / "out", *SHARE, data=tmp_path / "data")
    assert done.exit_code == 0, done.stderr
    words = usual(place, sae=None, data=tmp_path / "data")
    judged = run("evaluate", *words, "--adapter-path", tmp_path / "out", "--samples", 0)
    assert judged.exit_code == 0, judged.stderr
    assert "--valid-share" not in judged.stderr


def test_a_resumed_run_of_another_share_is_refused(place, tmp_path):
    assert dpo(place, tmp_path, *SHARE).exit_code == 0
    again = dpo(place, tmp_path, "--valid-share", 0.3, "--resume", "--iters", 3)
    refused(again, 2, "valid_share", "fingerprints.data")
    more = dpo(place, tmp_path, *SHARE, "--resume", "--iters", 3)
    assert more.exit_code == 0, more.stderr


def test_where_nothing_is_held_out_the_share_is_named_and_so_is_a_test(place, tmp_path):
    alone = dpo(place, tmp_path / "a").stderr
    assert "--valid-share 0.2 holds about 4 of the 20 pairs back" in alone
    assert "No pair was held out" in alone
    assert "--valid-split test" not in alone
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    lines(tmp_path / "data" / "test.jsonl", ROWS[0])
    assert "--valid-split test" in dpo(place, tmp_path / "b", data=tmp_path / "data").stderr


def test_a_share_beside_validation_pairs_is_refused(place, tmp_path):
    refused(dpo(place, tmp_path, *SHARE, data="split"), 2, "a validation split of its own")
    both = dpo(place, tmp_path, *SHARE, "--valid-split", "valid", data="split")
    refused(both, 2, "exclude each other")
    refused(dpo(place, tmp_path, "--valid-share", 0.6), 2, "--valid-share 0.6")
