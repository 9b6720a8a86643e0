"""Two processes train as one does, stop alike, and leave a run that can be resumed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, run
from launchers import finish, launch, mlx_launch, start_ring

from fpo_mlx import cache
from fpo_mlx.errors import ConfigError
from fpo_mlx.sae.convert import write_saelens

mx = pytest.importorskip("mlx.core")

from helpers import log_of  # noqa: E402

from fpo_mlx.machine.parallel import Part, Ranks, open_ranks  # noqa: E402

# the command line, with a fault in the process of rank 1 when it has asked the others so often
FAULTY = """
import os, signal, sys, time
from fpo_mlx import machine
machine.set_up()
from fpo_mlx.machine import parallel
from fpo_mlx.cli import main
asked, real = [], parallel.Ranks.largest

def largest(self, number):
    asked.append(number)
    if self.rank == 1 and len(asked) == {when}:
        {fault}
    return real(self, number)

parallel.Ranks.largest = largest
main(sys.argv[1:])
"""
DIE, TERM, HANG = (
    f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGTERM", "SIGSTOP")
)
ASKED = 1  # before the first update: whether the reference has to run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Five pairs, so that of every third update of two one process has none; and their cache."""
    root = tmp_path_factory.mktemp("parallel")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    rows = [{**ROWS[n % 4], "prompt": f"{'Question ' * n}{n}?"} for n in range(5)]
    lines(root / "data" / "train.jsonl", *rows)
    lines(root / "data" / "valid.jsonl", *({**row, "prompt": "Held out?"} for row in rows[:3]))
    made = run("precompute", *inputs(root), "--output", root / "ref")
    assert made.exit_code == 0, made.stderr
    return root


def inputs(root: Path) -> list[object]:
    return ["--model", root / "model", "--sae", root / "sae", "--data", root / "data"]


def train(root: Path, out: Path, *more: object) -> list[object]:
    settings = {
        "top-k": 5, "iters": 20, "batch-size": 2, "learning-rate": 1e-3, "steps-per-report": 1,
        "steps-per-eval": 10, "save-every": 10, "num-layers": 2, "reference": root / "ref",
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["train", *inputs(root), *flags, "--adapter-path", out, *more]


def weights(out: Path) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in mx.load(str(out / "adapters.safetensors")).items()}


@pytest.fixture(scope="module")
def two(place, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("two") / "out"
    done = launch(mlx_launch(2, *train(place, out)))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"adapters in {out}\n"  # one of them speaks
    assert done.stderr.count("iterations of 2") == 1
    return out


def test_two_processes_with_a_pair_each_train_as_one_with_two(place, two, tmp_path):
    one = run(*train(place, tmp_path / "one"))
    assert one.exit_code == 0, one.stderr
    got, want = log_of(two), log_of(tmp_path / "one")
    assert [(x["kind"], x["iteration"]) for x in got] == [(x["kind"], x["iteration"]) for x in want]
    assert len([x for x in got if x["kind"] == "train"]) == 20
    for x, y in zip(got, want, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["metrics"] == pytest.approx(y["metrics"], rel=1e-4, abs=1e-5)
    moved = weights(tmp_path / "one")
    for name, array in weights(two).items():
        np.testing.assert_allclose(array, moved[name], rtol=0, atol=1e-4 * abs(moved[name]).max())


def test_two_processes_find_the_alpha_of_one_and_the_same_part_at_the_end(place, tmp_path):
    more = [{**row, "prompt": f"{row['prompt']} {i}"} for row in ROWS for i in range(17)]
    lines(tmp_path / "data" / "valid.jsonl", *more[:17])
    shutil.copyfile(place / "data" / "train.jsonl", tmp_path / "data" / "train.jsonl")
    words = ["--target-drift", 0.05, "--iters", 6, "--data", tmp_path / "data"]
    words += ["--reference", tmp_path / "ref"]
    assert run(*train(place, tmp_path / "one", *words)).exit_code == 0
    both = [["-m", "fpo_mlx", *train(place, tmp_path / "two", *words)]] * 2
    done = finish(start_ring(both, tmp_path / "hosts.json"))
    assert [result[0] for result in done] == [0, 0], done
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    alphas = [[x["alpha"] for x in log if x["kind"] == "train"] for log in (one, two)]
    assert len(set(alphas[0])) == 6  # it moves with every update
    assert alphas[1] == pytest.approx(alphas[0], rel=1e-4)
    ends = [[x for x in log if x["kind"] == "landed"] for log in (one, two)]
    assert ends[1][0]["part"] == pytest.approx(ends[0][0]["part"], rel=1e-3)
    moved = weights(tmp_path / "one")
    for name, array in weights(tmp_path / "two").items():
        np.testing.assert_allclose(array, moved[name], rtol=0, atol=1e-3 * abs(moved[name]).max())


def test_two_processes_score_the_same_part_of_the_pairs_and_train_as_with_all_scores(
    place, tmp_path, monkeypatch
):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    few = ["--iters", 2, "--val-batches", 1]
    whole = [["-m", "fpo_mlx", *train(place, tmp_path / "whole", *few)]] * 2
    words = train(place, tmp_path / "some", *few)
    at = words.index("--reference")
    some = [["-m", "fpo_mlx", *words[:at], *words[at + 2 :]]] * 2
    for name, both in (("whole", whole), ("some", some)):
        done = finish(start_ring(both, tmp_path / f"{name}.json"))
        assert [result[0] for result in done] == [0, 0], done
    assert "scores of 4 of 5 training pairs and 2 of 3 validation pairs" in done[0][2]
    (entry,) = cache.list_caches(tmp_path / "user-cache" / "reference")
    assert len(cache.open_cache(entry.folder, cache.read_identity(entry.folder))) == 2 * (4 + 2)
    assert log_of(tmp_path / "some") == log_of(tmp_path / "whole")
    one, other = (tmp_path / name / "adapters.safetensors" for name in ("some", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_killed_process_ends_the_run_and_leaves_one_that_resumes_to_the_same_end(
    place, two, tmp_path
):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    code = FAULTY.format(when=ASKED + 13, fault=DIE)
    words = [["-c", code, *train(place, out)]] * 2
    first, second = finish(start_ring(words, tmp_path / "hosts.json"))
    assert (first[0], second[0]) == (1, -9), first
    assert "lost another process" in first[2]
    assert "Traceback" not in first[2]
    assert log_of(out)[-1]["iteration"] == 13
    # on another machine the second process finds none of the first one's files
    words = [["-m", "fpo_mlx", *train(place, path, "--resume")] for path in (out, elsewhere)]
    resumed = finish(start_ring(words, tmp_path / "hosts.json"))
    assert [done[0] for done in resumed] == [0, 0], resumed
    assert "resumed after iteration 10" in resumed[0][2]
    assert not elsewhere.exists()
    assert log_of(out) == log_of(two)
    for name in ("adapters.safetensors", "best/adapters.safetensors"):
        assert (out / name).read_bytes() == (two / name).read_bytes()


def test_a_signal_to_one_process_stops_all_after_the_same_update(place, tmp_path):
    code = FAULTY.format(when=ASKED + 4, fault=TERM)
    words = [["-c", code, *train(place, tmp_path / "out")]] * 2
    done = finish(start_ring(words, tmp_path / "hosts.json"))
    assert [result[0] for result in done] == [143, 143], done
    assert "stopped after iteration 5" in done[0][2]
    assert log_of(tmp_path / "out")[-1]["iteration"] == 5
    assert (tmp_path / "out" / "checkpoint" / "state.safetensors").is_file()


SLOW_TO_SAVE = """
from fpo_mlx.train.checkpoint import AdapterFolder
save = AdapterFolder.save_state

def slowly(self, *words):
    time.sleep(1)
    save(self, *words)
    open({saves!r}, "a").write("x")

AdapterFolder.save_state = slowly
open({saves!r}, "a").close()
try:
    main(sys.argv[1:])
finally:
    print(open({saves!r}).read() + ".", file=sys.stderr)
"""


def test_no_process_ends_before_the_first_one_has_saved(place, tmp_path):
    """A launcher ends all when one of them ends: it would end the first amid its save."""
    saves = str(tmp_path / "saves")
    code = FAULTY.replace("main(sys.argv[1:])", SLOW_TO_SAVE)
    code = code.format(when=ASKED + 4, fault=TERM, saves=saves)
    words = [["-c", code, *train(place, tmp_path / "out")]] * 2
    done = finish(start_ring(words, tmp_path / "hosts.json"))
    assert [result[0] for result in done] == [143, 143], done
    of_first, of_second = (result[2].split()[-1] for result in done)
    assert of_first == of_second != "."


def test_a_process_that_hangs_ends_the_run_when_the_patience_ends(place, tmp_path):
    code = FAULTY.format(when=ASKED + 3, fault=HANG)
    words = [["-c", code, *train(place, tmp_path / "out", "--peer-timeout", 2)]] * 2
    first, second = start_ring(words, tmp_path / "hosts.json")
    try:
        ((code, _, said),) = finish([first])
    finally:
        second.kill()
    assert code == 1
    assert "heard nothing from the others for 2 seconds (--peer-timeout)" in said


@pytest.mark.parametrize("patience", [float("inf"), 1e12])
def test_a_patience_longer_than_any_wait_waits(monkeypatch, patience):
    """--peer-timeout inf: the thread that waits died of it, in every message."""
    died = []
    monkeypatch.setattr("threading.excepthook", died.append)
    monkeypatch.setattr(mx, "eval", lambda array: time.sleep(0.2))  # of a message
    Ranks(0, 2, None, patience)._wait(mx.array([1.0]))
    assert died == []


def test_settings_that_several_processes_cannot_share_are_plain_errors(tmp_path):
    two = {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(ConfigError, match="is 3, which 2 processes cannot divide evenly"):
        open_ranks(two, count=3)
    with pytest.raises(ConfigError, match=r"needs `mlx.launch -n 2"):
        open_ranks(two, count=4)
    assert open_ranks({}, count=3) == Ranks()


def test_pairs_are_dealt_out_in_turn_and_a_process_without_one_borrows_the_first():
    parts = [Ranks(rank, 3).part(7) for rank in range(3)]
    assert [part.positions.tolist() for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert not any(part.idle for part in parts)
    last = Ranks(2, 3).part(2)
    assert (last.positions.tolist(), last.idle) == ([0], True)


def test_alone_nothing_is_sent_and_nothing_changes(tmp_path):
    alone, values = Ranks(), {"loss": np.array([0.1, np.nan])}
    tree = {"a": mx.ones(2)}
    assert alone.sum(tree) is tree
    assert alone.from_first(tree) is tree
    assert alone.gather(values, Part(np.arange(2)), 2) == values
    assert alone.largest(7) == 7
    assert alone.share_folder(tmp_path / "no")
    assert list(tmp_path.iterdir()) == []
    with alone.file_of_first(tmp_path / "x") as path:
        assert path == tmp_path / "x"
