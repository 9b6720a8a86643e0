"""scripts/studies/drift_targets.py: controls come first, and what they say of the targets."""

from __future__ import annotations

from dataclasses import asdict

import drift_targets as dt
import pytest


def kept_of(cell, drift, code=0):
    held = {"drift": drift, "margin": 0.2, "accuracy": 0.9, "chosen_change": -0.1}
    return {cell.id: asdict(cell) | {"held_out": held, "alphas": [3.0, 2.0], "exit_code": code}}


def test_every_target_comes_after_its_control_and_no_cell_twice():
    plan = list(dt.cells(["smollm2/jumprelu", "smollm2/topk", "small/topk"], 3))
    ids = [cell.id for cell in plan]
    assert len(ids) == len(set(ids))
    assert {cell.sae for cell in plan[:10]} == {"jumprelu", "topk"}  # before rates and batches
    assert all(ids.index(cell.control.id) <= ids.index(cell.id) for cell in plan)
    assert {cell.batch_size for cell in plan if cell.model == "small"} == {1, 4, 16}
    assert {cell.seed for cell in plan if cell.model == "small"} == {0, 1, 2}


@pytest.mark.parametrize(("free", "beyond"), [(0.09, True), (0.11, False)])
def test_a_target_that_a_free_training_does_not_reach_is_not_run(free, beyond):
    cell = dt.Cell("small", "topk", 0.1, 1e-4, 1, 0)
    assert dt.out_of_reach(cell, {}) is False  # its control has not run yet
    assert dt.out_of_reach(cell, kept_of(cell.control, free)) is beyond
    assert dt.out_of_reach(cell.control, kept_of(cell.control, free)) is False


def test_a_run_that_the_guard_stopped_is_measured_where_it_was():
    def entry(kind, iteration, drift):
        metrics = {
            "drift/rejected": drift, "drift/chosen": 0.04, "rewards/margins": 0.02,
            "rewards/accuracies": 0.5, "logps_per_token/chosen_change": -0.1,
        }  # fmt: skip
        return {"kind": kind, "iteration": iteration, "metrics": metrics}

    log = [entry("valid", 0, 0.0), *(entry("train", n, 0.01 * n) for n in range(1, 26))]
    assert dt.held_out(log)["drift"] == pytest.approx(0.155**0.5)  # of updates 6 to 25
    assert dt.held_out([*log, entry("valid", 25, 0.09)])["drift"] == pytest.approx(0.3)


def test_the_table_counts_what_is_near_its_target_and_what_was_stopped():
    cells = [dt.Cell("small", "topk", target, 1e-4, 1, 0) for target in (0.0, 0.1, 0.2, 0.3)]
    drifts, codes = (0.5, 0.105, 0.25, 0.27), (0, 0, 4, 0)
    kept = {}
    for cell, drift, code in zip(cells, drifts, codes, strict=True):
        kept |= kept_of(cell, drift, code)
    kept[cells[1].id] |= {"whole": {"drift": 0.13}, "part": 0.8}
    text = dt.markdown(kept)
    assert "- small: 1 runs, 1 within 10 % of the target, ratio 1.05 to 1.05, median 1.05\n" in text
    assert "- small, the whole changes: 1 runs, 0 within 10 % of the target, ratio 1.30" in text
    assert "- small, not landed: 2 runs, 1 within 10 % of the target, ratio 0.90 to 1.25" in text
    assert "(1 stopped by the guard" in text
    assert "| small | topk | 1e-04 | 1 | 0 | 0.500 | 0.1 | 1.30 | 0.80 | 0.105 | 1.05 |" in text
    assert "| small | topk | 1e-04 | 1 | 0 | 0.500 | 0.2 | | | 0.250 | 1.25 |" in text
    assert "- smollm2: none run yet." in text


def test_a_run_of_before_ends_were_landed_is_run_again_and_a_control_is_not():
    cell = dt.Cell("small", "topk", 0.1, 1e-4, 1, 0)
    old = kept_of(cell, 0.12) | kept_of(cell.control, 0.5)
    assert not dt.is_kept(cell, old)
    assert dt.is_kept(cell.control, old)
    old[cell.id] |= {"whole": {}, "part": 1.0}
    assert dt.is_kept(cell, old)


def test_the_part_is_what_the_log_says_or_the_whole():
    assert dt.part([{"kind": "train"}, {"kind": "landed", "part": 0.8}]) == 0.8
    assert dt.part([{"kind": "train"}]) == 1.0
