"""The window of a training is closed, or its person logs out: what was trained is saved."""

from __future__ import annotations

import json
import re

import pytest
import tiny_models
from command_line import ROWS, lines, own_cache_and_signals, train  # noqa: F401
from launchers import environment
from terminal import when_it_closes

pytest.importorskip("mlx.core")

HEEDED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also of tests under nohup
IGNORED = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # what nohup does


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("hangup")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    lines(root / "data" / "train.jsonl", *ROWS)
    return root


def training(place, out, iters):
    words = [
        "train", "--model", place / "model", "--data", place / "data", "--objective", "dpo",
        "--top-k", 5, "--batch-size", 1, "--steps-per-report", 1, "--save-every", 10**6,
        "--iters", iters, "--adapter-path", out,
    ]  # fmt: skip
    return f"from fpo_mlx.cli import main\nmain({[str(word) for word in words]!r})"


def test_a_closed_terminal_ends_the_run_with_all_of_it_saved(place, tmp_path):
    out = tmp_path / "out"
    given = f"{HEEDED}\n{training(place, out, 10**5)}"
    code = when_it_closes(given, environment(), after="     3  loss")
    assert code == 129
    assert (out / "checkpoint" / "state.safetensors").is_file()
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    done = told[-1]["iteration"]
    again = train(place, out, "--objective", "dpo", "--iters", done + 2, "--resume", sae=None)
    assert again.exit_code == 0, again.stderr
    assert f"resumed after iteration {done}" in again.stderr
    assert re.search(rf"^ *{done + 2}  loss", again.stderr, re.MULTILINE)


def test_under_nohup_a_closed_terminal_ends_nothing_though_nobody_reads_on(place, tmp_path):
    """Whatever is written from then on fails."""
    out = tmp_path / "out"
    given = f"{IGNORED}\n{training(place, out, 40)}"
    code = when_it_closes(given, environment(), after="     3  loss")
    assert code == 0
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert told[-1]["iteration"] == 40
    assert (out / "adapters.safetensors").is_file()


def test_tables_after_a_line_that_nobody_read_are_no_error_either():
    code = (
        f"{IGNORED}\nimport os, time\nfrom fpo_mlx.cli.show import listing, say\nsay('begun')\n"
        "while os.isatty(1): time.sleep(0.01)\n"
        "say('unread')\nlisting({'figure': 1})"
    )
    assert when_it_closes(code, environment(), after="begun") == 0
