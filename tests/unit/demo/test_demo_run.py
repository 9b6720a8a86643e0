"""The demo, whole, on a tiny model: what it prints at the end, writes, and shows on the way."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from command_line import lines, random_sae, run
from terminal import on_a_terminal

from fpo_mlx.cli.machine import last_lines
from fpo_mlx.demo import run as demo
from fpo_mlx.demo import smollm2
from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")

VALID = 6  # held-out pairs of the tiny demo

# The demo with another model, SAE and fewer pairs; nothing else is changed.
SMALL = """
import dataclasses, sys
from pathlib import Path
from fpo_mlx.demo import run, smollm2
root = Path({root!r})
smollm2.fetch = lambda wheel, say: smollm2.Folders(root / "model", root / "model")
run.SAE = root / "sae"
run.DATA = root / "data"
run.SETTINGS |= {{"top_k": 5, "steps_per_report": 2}}
run.ANSWER = dataclasses.replace(run.ANSWER, max_tokens=24)
from fpo_mlx.cli import main
main(["demo", "--output", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    for name, count in (("train", 4), ("valid", VALID)):
        rows = (demo.DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        shortest = sorted(rows, key=len)[:count]  # a byte is a token here
        lines(root / "data" / f"{name}.jsonl", *map(json.loads, shortest))
    return root


@pytest.fixture(scope="module")
def small(place):
    folders = smollm2.Folders(place / "model", place / "model")
    answer = replace(demo.ANSWER, max_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "fetch", lambda wheel, say: folders)
        patch.setattr(demo, "SAE", place / "sae")
        patch.setattr(demo, "DATA", place / "data")
        patch.setattr(demo, "ANSWER", answer)
        patch.setitem(demo.SETTINGS, "top_k", 5)
        patch.chdir(place)
        patch.setenv("COLUMNS", "80")
        yield place


@pytest.fixture(scope="module")
def done(small):
    """The command's result; its folder is fpo-demo in the current one."""
    result = run("demo")
    assert result.exit_code == 0, result.output
    return result


def test_it_ends_in_fifteen_lines_that_fit_80_columns(done):
    shown = done.stdout.splitlines()
    assert len(shown) <= 15
    assert max(map(len, shown)) <= 80
    assert shown[0] == demo.QUESTION
    for said in ("before", "after", "ln 2", "Report: fpo-demo/report.html", "fpo-demo/results.txt"):
        assert said in done.stdout
    assert len(re.findall(r"^  fpo-mlx (check|train|report) ", done.stdout, re.M)) == 3
    parts = re.findall(r"^\[(\d)/7\] (.*)$", done.stderr, re.M)
    assert [title for _, title in parts] == [title for title, _ in demo.PARTS.values()]
    assert "\x1b" not in done.output
    assert "|" not in done.stderr, "no bar in a pipe"


def test_everything_it_says_lies_there(small, tmp_path):
    shares: list[float] = []
    report = demo.run(workdir=tmp_path / "d", say=lambda _: None, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert len(shares) > len(demo.PARTS), "the long parts move the bar as they go on"
    assert report.first_loss == pytest.approx(0.693147, abs=1e-5)
    page = report.page.read_text(encoding="utf-8")
    assert demo.QUESTION in page
    assert "nothing of" not in page
    judged = json.loads((report.adapters / "evaluate.json").read_text(encoding="utf-8"))
    assert judged["summary"]["n"] == VALID
    assert judged["base"]["summary"]["policy_accuracy"] == report.policy_accuracy_before
    shown = {figure.value for figure in report.figures()}
    assert f"{judged['summary']['rewards/accuracies']:.2f}" in shown
    assert (report.fused / "config.json").is_file()
    assert set(report.seconds) == set(demo.PARTS)


def test_the_table_holds_every_figure_and_the_answers_in_full(done):
    text = Path("fpo-demo/results.txt").read_text(encoding="utf-8")
    kept = json.loads(Path("fpo-demo/adapters/evaluate.json").read_text(encoding="utf-8"))
    assert {line.split("  ")[0] for line in text.splitlines()} >= set(kept["summary"])
    answers = json.loads(Path("fpo-demo/adapters/compare.json").read_text(encoding="utf-8"))
    (row,) = answers["prompts"]
    assert all(answer in text for answer in row["answers"].values())
    assert "None" not in text


@pytest.mark.parametrize("words", [0, 1, 12, 40, 400])
def test_answers_of_any_length_leave_fifteen_lines(words, tmp_path):
    text = " ".join(["elephant"] * words)
    summary = {
        "policy_accuracy": 0.5, "rewards/accuracies": 1.0, "logps_per_token/chosen_change": 0.2,
        "features/chosen": 1234.5, "features/rejected": 1234.5,
    }  # fmt: skip
    here = Path("fpo-demo")
    report = demo.DemoReport(
        0.6931, 0.25, summary, text, text, here, here, here, here / "report.html",
        here / "results.txt", {},
    )  # fmt: skip
    shown = list(last_lines(report, 80))
    assert len(shown) <= 15
    assert max(map(len, shown)) <= 80


def test_a_terminal_sees_a_bar_with_the_time_that_is_left(place, tmp_path):
    text, code = on_a_terminal("-c", SMALL.format(root=str(place)), tmp_path / "d")
    assert code == 0, text
    assert re.search(r"\d+% \|.*\| \d\d:\d\d, about (\d\d:\d\d|\?) left", text)
    assert text.rstrip().endswith("fpo-mlx report my-adapters")


def test_a_python_without_pip_is_given_one_that_has(monkeypatch, tmp_path):
    assert smollm2._python_with_pip(tmp_path) == sys.executable
    made = []
    monkeypatch.setattr(smollm2, "_has_pip", lambda: False)
    monkeypatch.setattr(smollm2.venv, "create", lambda place, **how: made.append((place, how)))
    assert smollm2._python_with_pip(tmp_path) == sys.executable  # none was made: pip's own error
    assert made[0][1]["with_pip"]
    python = tmp_path / "with-pip" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert smollm2._python_with_pip(tmp_path) == str(python)
