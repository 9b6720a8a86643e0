"""Commands as a user gives them, in this process: words in, a click Result out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fpo_mlx.cli import main
from fpo_mlx.cli.train import on_signal_within
from fpo_mlx.records import SaeWeights, Site

FEATURES, BLOCK = 48, 1


ROWS = [
    {"prompt": f"Question {n}?", "chosen": f"Short answer {n}.", "rejected": f"Well, {n} or so, so"}
    for n in range(4)
]


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_sae(width: int, block: int = BLOCK) -> SaeWeights:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(width, FEATURES)).astype(np.float32) / width**0.5
    zeros = np.zeros(FEATURES, np.float32)
    return SaeWeights(
        "relu", w, zeros, w_dec=w.T.copy(), b_dec=np.zeros(width, np.float32),
        site=Site(block), source="random",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache_and_signals(tmp_path, monkeypatch):
    """For modules of tests that import it: nothing of one test is left to the next."""
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    with on_signal_within():
        yield


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def usual(root: Path, **changes: Path | str | None) -> list[object]:
    """--model, --sae, --data and a top-k that suits 48 features; None leaves one out."""
    flags = {"model": root / "model", "sae": root / "sae", "data": root / "data"} | changes
    words = [(f"--{name}", value) for name, value in flags.items() if value is not None]
    return [word for pair in words for word in pair]


def train(place: Path, out: Path, *words: object, **changes: Path | str | None) -> Result:
    flags = ["--top-k", 5, "--iters", 2, "--batch-size", 1, "--steps-per-report", 1]
    return run("train", *usual(place, **changes), *flags, "--adapter-path", out, *words)


def refused(result: Result, code: int, *parts: object) -> None:
    """This exit code, and one plain message on stderr that has these parts in it."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    plain = re.findall(r"^(?:fpo-mlx|Error): ", result.stderr, re.MULTILINE)
    assert len(plain) == 1, result.stderr
    message = result.stderr[result.stderr.rindex(plain[0]) :]
    for part in parts:
        assert str(part) in message
