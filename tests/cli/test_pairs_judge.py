"""`fpo-mlx pairs judge --judge`: a local model, its letters' probabilities, both orders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from command_line import refused, run  # noqa: E402
from evaluated import own_cache, place  # noqa: E402, F401
from judges import candidates, graded  # noqa: E402
from tiny_tokenizer import CHATML, build_tiny_tokenizer  # noqa: E402

from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.judge.choice import letter_masses  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.pairs import question  # noqa: E402
from fpo_mlx.pairs.records import open_candidates  # noqa: E402


def test_the_masses_are_the_models_own_next_token_probabilities(place):
    model = load_model(place / "model").model
    prompt = np.arange(5, 25).astype(np.int32)
    logits = np.array(model(mx.array(prompt[None]))[0, -1].astype(mx.float32), np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    got = letter_masses(model, prompt, [[7], [9, 11]])
    assert got == pytest.approx([p[7], p[9] + p[11]], abs=1e-6)


def test_both_orders_are_judged_by_what_the_model_would_say_next(place, tmp_path, monkeypatch):
    monkeypatch.setattr(question, "LEAST_MASS", 0.0)  # a random model says anything
    source, out = candidates(tmp_path / "c.jsonl", graded(3)), tmp_path / "v.jsonl"
    words = ["--judge", place / "model", "--output", out]
    done = run("pairs", "judge", source, *words, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [v["order"] for v in found] == ["ab", "ba"] * 3
    model, tokenizer = load_model(place / "model").model, load_tokenizer(place / "model")
    sets, criteria = open_candidates(source), question.read_criteria(None)
    letters = [[tokenizer.text_tokens(text)[0] for text in (x,)] for x in "AB"]
    for v in found:
        first, second = (v["a"], v["b"]) if v["order"] == "ab" else (v["b"], v["a"])
        asked = question.messages(sets.get(v["id"]), first, second, criteria)
        a, b = letter_masses(model, np.array(tokenizer.prompt_tokens(asked), np.int32), letters)
        p = a / (a + b)
        assert v["p"] == pytest.approx(p if v["order"] == "ab" else 1 - p, abs=1e-4)
        assert v["verdict"] == ("a" if v["p"] > 0.5 else "b")
    report = json.loads((tmp_path / "r.json").read_text())
    (figures,) = report["judges"].values()
    assert figures["verdicts"] == 6
    assert "first share" in done.stdout
    before = out.read_bytes()
    assert "0 verdicts, 6 were there already" in run("pairs", "judge", source, *words).stdout
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("compare", "pairs"),
    [("all", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
     ("neighbours", [(0, 1), (0, 3), (1, 2), (2, 3)])],
)  # fmt: skip
def test_answers_are_compared_each_with_each_or_in_a_ring(tmp_path, compare, pairs):
    source, out = candidates(tmp_path / "c.jsonl", graded(1, 4)), tmp_path / "v.jsonl"
    words = ["--reward", "brevity", "--compare", compare, "--output", out]
    done = run("pairs", "judge", source, *words)
    assert done.exit_code == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((v["a"], v["b"]) for v in found) == pairs


THINKS = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)


def test_a_judge_whose_template_lets_it_think_first_is_asked_for_the_letter_at_once(
    place, tmp_path, monkeypatch
):
    """Qwen3's writes an empty thought where it is told not to think; else the letter comes late."""
    folder = shutil.copytree(place / "model", tmp_path / "thinker")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    build_tiny_tokenizer(folder, THINKS)
    asked = []
    monkeypatch.setattr(
        "fpo_mlx.judge.choice.letter_masses",
        lambda model, tokens, letters: asked.append(tokens) or [1, 0],
    )
    source = candidates(tmp_path / "c.jsonl", graded(2))
    done = run("pairs", "judge", source, "--judge", folder, "--output", tmp_path / "v")
    assert done.exit_code == 0, done.stderr
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode(tokens).endswith(end) for tokens in asked] == [True] * 4


@pytest.mark.parametrize("by", ["owner/model", "folder"])
def test_kin_of_the_judge_are_warned_of_and_nothing_is_fetched_for_that(
    place, tmp_path, monkeypatch, by
):
    """The candidates were made elsewhere, by a model of the hub whose config alone is here."""
    import huggingface_hub

    def no_download(*_, **__):
        raise AssertionError("a model was fetched")

    config = tmp_path / "cache/config.json"
    config.parent.mkdir()
    shutil.copyfile(place / "model/config.json", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_download)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache",
        lambda repo, *_, **__: str(config) if repo == "owner/model" else None,
    )  # fmt: skip
    model = by if by == "owner/model" else str(config.parent)
    source = candidates(tmp_path / "c.jsonl", graded(1), model=f"{model} + adapters")
    words = ["--judge", place / "model", "--output", tmp_path / "v.jsonl"]
    assert "are of one family" in run("pairs", "judge", source, *words).stderr
    source = candidates(tmp_path / "d.jsonl", graded(1), model="owner/other")
    assert "are of one family" not in run("pairs", "judge", source, *words).stderr


def test_what_build_cannot_do_is_said_before_a_reward_judges(tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(3))
    words = ["pairs", "build", source, "--reward", "brevity", "--output", tmp_path / "pairs"]
    refused(run(*words, "--verdicts", tmp_path / "no.jsonl"), 1, "no.jsonl")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/mine.txt").write_text("mine")
    refused(run(*words), 2, "mine.txt")
    assert not (tmp_path / "c-rewards.jsonl").exists()


def test_votes_to_compare_with_are_read_before_the_judge_is_asked(place, tmp_path):
    source = candidates(tmp_path / "c.jsonl", graded(3))
    words = ["--reward", "brevity", "--against", tmp_path / "no.jsonl"]
    out = tmp_path / "v.jsonl"
    refused(run("pairs", "judge", source, *words, "--output", out), 1, "no.jsonl")
    assert not out.exists()


def test_a_model_that_says_neither_letter_labels_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(question, "LEAST_MASS", 1.1)
    source = candidates(tmp_path / "c.jsonl", graded(2))
    done = run("pairs", "judge", source, "--judge", place / "model", "--output", tmp_path / "v")
    assert done.exit_code == 0, done.stderr
    said = {json.loads(line)["verdict"] for line in (tmp_path / "v").read_text().splitlines()}
    assert said == {"unreadable"}
    assert "cannot be read" in done.stderr
    again = run("pairs", "judge", source, "--judge", place / "model", "--output", tmp_path / "v")
    assert "0 verdicts, 4 were there already" in again.stdout  # it would say the same again


@pytest.mark.parametrize(
    ("words", "part"),
    [((), "found none"), (("--judge", "m", "--reward", "brevity"), "--judge, --reward"),
     (("--judge-url", "ftp://x", "--judge-model", "m"), "http"),
     (("--judge-url", "http://x"), "--judge-model"),
     (("--judge", "m", "--criteria", "/nothing"), "--criteria")],
)  # fmt: skip
def test_who_judges_has_to_be_said_once(tmp_path, words, part):
    source = candidates(tmp_path / "c.jsonl", graded(2))
    refused(run("pairs", "judge", source, *words, "--output", tmp_path / "v"), 2, part)
