"""Chosen answers that lose much are told of once in a run, with what helps, and end nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny_models

pytest.importorskip("mlx.core")

from helpers import SIZES, log_of, open_trainer, random_pairs  # noqa: E402

from fpo_mlx.config import Objective, TrainConfig  # noqa: E402
from fpo_mlx.train import guard  # noqa: E402
from fpo_mlx.train.events import StepReport, ValidReport  # noqa: E402

PAIRS = random_pairs(SIZES)
# what is chosen here is rejected there: training lowers it
TURNED = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in PAIRS]
BOUND = 0.1  # in place of 1, which these tiny models lose too slowly
CHANGE = "logps_per_token/chosen_change"
FALLS = {
    "preset": "simpo", "iters": 8, "steps_per_eval": 2, "save_every": 4, "learning_rate": 6e-2,
    "val_batches": -1, "max_margin": 1e9, "max_logp_drop": 1e9,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def low(monkeypatch):
    monkeypatch.setattr(guard, "COLLAPSE", BOUND)


def told(reports, kind) -> list[float]:
    """How much the chosen answers had lost where a report warns of it."""
    seen = [r for r in reports if isinstance(r, kind)]
    return [-r.metrics[CHANGE] for r in seen for w in r.warnings if "chosen answers lost" in w]


def test_the_first_validation_that_sees_it_says_so_and_no_later_one(llama, tmp_path, low):
    reports = list(open_trainer(llama, tmp_path, PAIRS, valid=TURNED, **FALLS).run())
    lost = [-r.metrics[CHANGE] for r in reports if isinstance(r, ValidReport)]
    assert told(reports, ValidReport) == [next(one for one in lost if one > BOUND)]
    assert sum(one > BOUND for one in lost) > 1
    assert told(reports, StepReport) == []
    assert sum(len(line["warnings"]) for line in log_of(tmp_path) if line["kind"] == "valid") == 1


def test_a_resumed_run_does_not_say_it_again(llama, tmp_path, low):
    assert told(open_trainer(llama, tmp_path, PAIRS, valid=TURNED, **FALLS).run(), ValidReport)
    more = {**FALLS, "iters": 16}
    again = open_trainer(llama, tmp_path, PAIRS, valid=TURNED, start=False, **more)
    again.resume()
    reports = list(again.run())
    assert any(-r.metrics[CHANGE] > BOUND for r in reports if isinstance(r, ValidReport))
    assert told(reports, ValidReport) == []


def test_without_held_out_pairs_the_training_pairs_say_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "COLLAPSE", -100.0)  # these gain
    reports = list(open_trainer(llama, tmp_path, PAIRS, **FALLS).run())
    assert len(told(reports, StepReport)) == 1


@pytest.mark.parametrize(("change", "said"), [(-0.9, False), (-1.1, True), (math.nan, False)])
def test_it_is_said_from_the_bound_on_with_what_helps(change, said):
    found = guard.fallen({CHANGE: change}, TrainConfig(), Objective())
    assert (found is not None) is said
    if found:
        for remedy in ("--nll-weight", "--learning-rate", "stop earlier"):
            assert remedy in found
        held = dataclasses.replace(Objective(), nll_weight=0.5)
        more = guard.fallen({CHANGE: change}, TrainConfig(), held)
        assert more is not None
        assert "raise --nll-weight above 0.5" in more
