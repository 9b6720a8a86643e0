"""`fpo-mlx pairs plan` and `pairs check`: cost before it arises, faults of files by name."""

from __future__ import annotations

import json
import re

import pytest
from command_line import lines, refused, run
from judges import candidates, graded

from fpo_mlx.machine import answering
from fpo_mlx.machine.answering import Batch, Speed
from fpo_mlx.machine.memory import ModelShape
from fpo_mlx.pipeline.pairs_check import LEVELS, pairs_check

REST = {"tokens": 3, "finish": "stop"}


def answers(id, *texts, **changes):
    return {
        "id": id,
        "prompt": f"{id}?",
        "candidates": [{"text": t, **REST, **changes} for t in texts],
    }


def said(id, a, b, order, verdict, judge="j"):
    return {"id": id, "a": a, "b": b, "order": order, "verdict": verdict, "judge": judge}


@pytest.fixture
def spoiled(tmp_path):
    """Every kind of fault once."""
    source = lines(
        tmp_path / "c.jsonl",
        answers("p", "one", "two"), answers("p", "one", "two"), answers("q", "alone"),
        answers("r", "same", " same"), answers("s", "cut", " ", finish="length"), {"id": 3},
    )  # fmt: skip
    verdicts = lines(
        tmp_path / "v.jsonl",
        said("p", 0, 1, "ab", "a"), said("p", 0, 1, "ab", "b"), said("x", 0, 1, "ab", "a", "k"),
        said("x", 0, 1, "ba", "a", "k"), said("p", 0, 5, "none", "a"),
        said("r", 0, 1, "none", "unreadable"), said("p", 0, 0, "ab", "a"),
        said("p", 0, 1, "none", "a", "m") | {"texts": "00000000-11111111"},
    )  # fmt: skip
    return source, verdicts


def test_every_kind_of_fault_is_found_and_named_with_its_first_line(spoiled):
    first, second = pairs_check(spoiled[0], [spoiled[1]])
    found = {kind.kind: kind for one in (first, second) for kind in one.kinds}
    assert set(found) == set(LEVELS)
    counts = {name: kind.count for name, kind in found.items()}
    assert counts == dict.fromkeys(LEVELS, 1) | {
        "no such line": 1, "unknown prompt": 2, "cut answer": 2, "one order only": 1,
    }  # fmt: skip
    assert found["unknown answer"].first == "v.jsonl:5: a 0, b 5 of 2 candidates"
    assert found["equal answers"].first.startswith("c.jsonl:4: ")
    assert found["verdict again"].first.startswith("v.jsonl:2: ")
    assert first.figures["prompts"] == 4
    assert first.figures["share cut by length"] == pytest.approx(2 / 9)
    assert second.judges["k"].flip_rate == 0.0


def test_the_command_says_so_and_ends_with_3_and_check_knows_the_files_too(spoiled, tmp_path):
    source, verdicts = spoiled
    for words in (("pairs", "check", source, "--verdicts", verdicts), ("check", "--data", source)):
        done = run(*words)
        assert done.exit_code == 3
        assert "c.jsonl:6: id is a number, wanted a text" in done.stderr
        assert "cut answer" in done.stdout
        assert "4 prompts" not in done.stderr
    done = run("check", "--data", verdicts)  # without candidates ids are not looked at
    assert done.exit_code == 3
    assert "unknown prompt" not in done.stdout
    assert "v.jsonl:7: a 0 and b 0" in done.stderr


@pytest.mark.parametrize(
    ("names", "more"),
    [(("chosen", "rejected"), ()),
     (("yes", "no"), ("--chosen-feature", "yes", "--rejected-feature", "no"))],
)  # fmt: skip
@pytest.mark.parametrize("extra", ["verdict", "candidates"])
def test_pairs_with_a_column_named_as_in_another_file_are_pairs(tmp_path, extra, names, more):
    row = {"prompt": "Q", names[0]: "A", names[1]: "B", extra: "A"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    done = run("check", "--data", tmp_path / "pairs.jsonl", *more)
    assert done.exit_code == 0, done.output
    assert re.search(r"^train +1 +0 +1 ", done.stdout, re.MULTILINE)


def test_good_files_end_with_0_and_leave_their_figures(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(5, 3))
    judged = run("pairs", "judge", source, "--reward", "brevity", "--output", tmp_path / "v.jsonl")
    assert judged.exit_code == 0, judged.stderr
    words = ("--verdicts", tmp_path / "v.jsonl", "--json", tmp_path / "r.json")
    done = run("pairs", "check", source, *words)
    assert done.exit_code == 0, done.stderr
    first, second = json.loads((tmp_path / "r.json").read_text())
    assert (first["figures"]["prompts"], first["figures"]["answers"]) == (5, 15)
    assert second["lines"] == 15
    refused(run("pairs", "check"), 2, "nothing to look at")
    refused(run("pairs", "check", tmp_path / "no.jsonl"), 1, "cannot be read")


SHAPE = ModelShape(
    blocks=2, hidden=10, heads=2, kv_heads=1, head_dim=4, inner=20, vocab=100, weights=4000,
    block_parameters=300, value_bytes=4,
)  # fmt: skip


def test_a_step_and_its_memory_by_hand():
    """8 FLOPs a key column and head... query 8: attention 4 x 8 x 64 columns x 2 blocks."""
    speed = Speed(gflops=1e-3, bandwidth=2000.0, cpu=False)  # 1e6 FLOP/s, of which 0.6
    flops = 3 * (2 * 300 * 2 + 4 * 8 * 64 * 2 + 2 * 10 * 100)
    assert answering.step_seconds(SHAPE, 3, 64, speed) == pytest.approx(2.0 + flops / 0.6e6)
    batches = [Batch(8, 64, (5, 5))]
    whole = answering.answer_seconds(SHAPE, batches, 3, 7, speed)
    prompt = 2.0 + (2 * 300 * 2 * 5 + 4 * 8 * 5 * 5 * 2) / 0.6e6
    assert whole == pytest.approx(21 * (2.0 + flops / 0.6e6) + 2 * prompt)  # 3 waves of 7 steps
    terms = {term.name: term.bytes for term in answering.answer_terms(SHAPE, batches, 3)}
    assert terms["keys and values"] == 3 * 64 * 2 * 8 * 4
    assert terms["vocabulary"] == 6 * 4 * 3 * 100


def test_plan_counts_answers_and_questions_and_says_what_does_not_fit(tmp_path):
    pytest.importorskip("mlx.core")
    import tiny_models

    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    (tmp_path / "p.txt").write_text("Why?\nWho are you?\nWhy?\n")
    words = ["pairs", "plan", "--model", tmp_path / "model", "--prompts", tmp_path / "p.txt"]
    words += ["--max-tokens", 8, "--judge", tmp_path / "model", "--json", tmp_path / "r.json"]
    done = run(*words, "--memory-gb", 1)
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["prompts"], found["answers"], found["questions"]) == (2, 8, 24)
    assert found["generate"]["fits"]
    assert found["judge"]["fits"]
    assert found["generate"]["seconds"] > 0
    done = run(*words, "--memory-gb", 0.0001, "--compare", "neighbours", "--overwrite")
    assert "DOES NOT FIT into 0.00 GB" in done.stdout
    assert "judge: 16 questions" in done.stdout
    refused(run(*words, "--memory-gb", -1, "--overwrite"), 2, "--memory-gb -1")
    refused(run("pairs", "plan", "--model", "m"), 2, "--prompts is missing")
