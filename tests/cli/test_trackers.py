"""What is sent to Weights & Biases and TensorBoard, and that they are told when the run is over."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
from command_line import ROWS, lines, train

from fpo_mlx.cli.trackers import tracking
from fpo_mlx.config import load_config
from fpo_mlx.errors import ConfigError
from fpo_mlx.train.events import SavedReport, StepReport, ValidReport

CONFIG = load_config({"adapter_path": "out", "learning_rate": 3e-5})
STEP = StepReport(10, 0.5, {"rewards/margins": 1.5}, 3e-5, 0.25, 40, 100.0, 2.0, 1.25, skipped=1)
VALID = ValidReport(10, 0.75, {"rewards/margins": 0.5}, 8, 1.0, best=True)


@pytest.fixture
def wandb(monkeypatch):
    """What a run of wandb was given."""
    seen = SimpleNamespace(init=[], logged=[], finished=0)

    class Run:
        def log(self, values, step):
            seen.logged.append((step, values))

        def finish(self):
            seen.finished += 1

    def init(**settings):
        seen.init.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return seen


@pytest.fixture
def board(monkeypatch):
    """What a writer of tensorboardX was given."""
    seen = SimpleNamespace(folder="", scalars=[], closed=0)

    class SummaryWriter:
        def __init__(self, folder):
            seen.folder = folder

        def add_scalar(self, name, value, step):
            seen.scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            seen.closed += 1

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    return seen


def test_losses_metrics_rate_and_gradient_norm_are_sent(wandb):
    with tracking("wandb", None, CONFIG) as track:
        for report in (STEP, VALID, SavedReport(10, numbered=True)):
            track(report)
    (settings,) = wandb.init
    assert (settings["project"], settings["config"]["learning_rate"]) == ("fpo-mlx", 3e-5)
    assert wandb.logged == [
        (
            10,
            {
                "train/loss": 0.5,
                "train/rewards/margins": 1.5,
                "train/learning_rate": 3e-5,
                "train/grad_norm": 0.25,
                "train/tokens_per_second": 100.0,
                "train/peak_memory_gb": 1.25,
                "train/skipped": 1,
            },
        ),
        (10, {"valid/loss": 0.75, "valid/rewards/margins": 0.5}),
    ]


def test_alpha_and_step_of_a_run_with_a_target_are_sent(wandb):
    """Under the names that metrics.jsonl has for them."""
    with tracking("wandb", None, CONFIG) as track:
        track(replace(STEP, alpha=12.5, part=0.5))
    ((_, values),) = wandb.logged
    assert (values["train/alpha"], values["train/part"]) == (12.5, 0.5)


def test_what_is_no_finite_number_is_not_sent(board):
    report = StepReport(10, 0.5, {"kl/margin": math.inf}, math.nan, None, 40, 100.0, 2.0, 1.25)
    with tracking("tensorboard", None, CONFIG) as track:
        track(report)
    assert {name for name, _, _ in board.scalars} == {
        "train/loss", "train/tokens_per_second", "train/peak_memory_gb", "train/skipped",
    }  # fmt: skip


def test_every_tracker_is_closed_also_when_the_run_fails(wandb, board):
    def fail():
        with tracking("wandb, tensorboard", "mine", CONFIG) as track:
            track(STEP)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (wandb.finished, board.closed) == (1, 1)
    assert board.folder == "out/tensorboard/mine"
    assert ("train/grad_norm", 0.25, 10) in board.scalars


def test_without_a_tracker_nothing_is_sent_and_an_unknown_one_is_refused(wandb):
    with tracking(None, None, CONFIG) as track:
        track(STEP)
    assert wandb.init == []
    with pytest.raises(ConfigError, match="--report-to mlflow: wanted wandb or tensorboard"):
        tracking("wandb,mlflow", None, CONFIG).__enter__()


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_tracker_that_is_not_installed_is_named_with_the_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"--report-to {name}: run `.* -m pip install {package}`"):
        tracking(name, None, CONFIG).__enter__()


def test_train_sends_every_report_of_the_run(wandb, tmp_path, monkeypatch):
    pytest.importorskip("mlx.core")
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    words = ["--objective", "dpo", "--report-to", "wandb", "--project-name", "mine"]
    done = train(tmp_path, tmp_path / "run", *words, sae=None)
    assert done.exit_code == 0, done.stderr
    assert [settings["project"] for settings in wandb.init] == ["mine"]
    assert [step for step, _ in wandb.logged] == [1, 2]
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [values["train/loss"] for _, values in wandb.logged] == [one["loss"] for one in log]
    assert wandb.finished == 1
