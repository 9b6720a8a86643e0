"""Several processes train one SAE as one does: activations, updates, stops and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from command_line import lines
from launchers import finish, start_ring
from safetensors.numpy import load_file

mx = pytest.importorskip("mlx.core")

from fpo_mlx.saetrain.finish import CARD, CONFIG, WEIGHTS  # noqa: E402
from fpo_mlx.saetrain.state import STATE  # noqa: E402

PLAIN = ["-m", "fpo_mlx"]
# the command line, with a signal to the process of rank 1 when it has asked the others so often
STOPPED = """
import os, signal, sys
from fpo_mlx import machine
machine.set_up()
from fpo_mlx.machine import parallel
from fpo_mlx.saetrain import trainer
from fpo_mlx.cli import main
real, asked = trainer.step, []

def step(*args):
    asked.append(1)
    if args[-1].rank == 1 and len(asked) == 7:
        os.kill(os.getpid(), signal.{signal})
    return real(*args)

trainer.step = step
main(sys.argv[1:])
"""


# the command line, with small messages: a checkpoint takes many
BLOCKS = """
import sys
from fpo_mlx import machine
machine.set_up()
from fpo_mlx.machine import parallel
from fpo_mlx.cli import main
parallel.BLOCK = 1000
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("saes")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    texts = (
        f"{'abcdefghijklm'[i % 13]} poem {i * i} of {'the sea ' * (i % 5)}." for i in range(90)
    )
    lines(root / "texts.jsonl", *({"text": text} for text in texts))
    return root


def words(place: Path, out: Path, *more: object) -> list[object]:
    """Two passes over chunks that the bound on memory makes; every third update is kept."""
    settings = {
        "model": place / "model", "data": place / "texts.jsonl", "output": out, "width": 48,
        "k": 6, "training-tokens": 768, "batch-size": 64, "save-every": 3, "steps-per-report": 1,
        "memory-gb": 5e-5, "learning-rate": 1e-2,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["sae", "train", *flags, *more]


def one(place: Path, out: Path, *more: object) -> str:
    ((code, _, said),) = finish(start_ring([[*PLAIN, *words(place, out, *more)]], hosts(out)))
    assert code == 0, said
    return said


def two(place: Path, outs: list[Path], *more: object, code: list[str] = PLAIN) -> list:
    return finish(start_ring([[*code, *words(place, out, *more)] for out in outs], hosts(outs[0])))


def hosts(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent / f"{out.name}-hosts.json"


def log_of(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: e[k] for k in ("step", "loss", "l0", "dead", "learning_rate")} for e in entries
    ]  # fmt: skip


def assert_same(found: Path, wanted: Path) -> None:
    for got, want in zip(log_of(found), log_of(wanted), strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    a, b = load_file(found / WEIGHTS), load_file(wanted / WEIGHTS)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-4 * abs(b[name]).max())


@pytest.mark.parametrize(
    "more",
    [
        ("--architecture", "topk"),
        ("--architecture", "jumprelu"),
        ("--architecture", "batchtopk", "--micro-batch-size", 16),
    ],
)
def test_two_processes_train_the_sae_of_one(place, tmp_path, more):
    """Batch top-k chooses within a micro-batch, so that has to be the same."""
    said = one(place, tmp_path / "one", *more)
    assert "chunks a pass" in said
    elsewhere = tmp_path / "elsewhere"  # the second machine's: nothing is written there
    done = two(place, [tmp_path / "two", elsewhere], *more)
    assert [code for code, *_ in done] == [0, 0], done
    assert not elsewhere.exists()
    assert done[1][1] == ""  # the first one speaks
    assert "SAE in" in done[0][1]
    assert_same(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / CONFIG).read_text() == (tmp_path / "one" / CONFIG).read_text()
    assert "held-out rows" in (tmp_path / "two" / CARD).read_text()


def test_stored_activations_are_written_once_for_both_and_read_by_one(place, tmp_path):
    store = ("--store", tmp_path / "store")
    done = two(place, [tmp_path / "two"] * 2, *store)
    assert [code for code, *_ in done] == [0, 0], done
    assert "writing the activations" in done[0][2]
    said = one(place, tmp_path / "one", *store)
    assert "writing the activations" not in said
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("name", "codes"), [("SIGTERM", [143, 143]), ("SIGKILL", [1, -9])])
def test_a_run_that_one_process_ended_resumes_to_the_same_bytes(place, tmp_path, name, codes):
    whole, cut, elsewhere = (tmp_path / part for part in ("whole", "cut", "elsewhere"))
    assert [code for code, *_ in two(place, [whole, whole])] == [0, 0]
    done = two(place, [cut, cut], code=["-c", STOPPED.format(signal=name)])
    assert [code for code, *_ in done] == codes, done
    assert "Traceback" not in done[0][2]
    assert (cut / STATE).is_file()
    resumed = two(place, [cut, elsewhere], "--resume", code=["-c", BLOCKS])
    assert [code for code, *_ in resumed] == [0, 0], resumed
    assert f"resumed after step {7 if name == 'SIGTERM' else 6} of" in resumed[0][2]
    assert not elsewhere.exists()
    assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert log_of(cut) == log_of(whole)


def test_a_batch_that_cannot_be_dealt_out_is_one_plain_message(place, tmp_path):
    done = two(place, [tmp_path / "out"] * 2, "--batch-size", 63)
    assert [code for code, *_ in done] == [2, 2], done
    assert "--batch-size is 63, which 2 processes cannot divide evenly" in done[0][2]
    assert not (tmp_path / "out").exists()
