"""What the end of `train` and its report warn of, in the same words."""

from __future__ import annotations

import pytest
from report_runs import a_report, a_run

from fpo_mlx.report.findings import warnings
from fpo_mlx.report.read import read_run
from fpo_mlx.report.verdict import verdict


def a_validation(iteration, metrics, pairs=40):
    found = {"kind": "valid", "iteration": iteration, "loss": 0.6, "pairs": pairs, "best": True}
    return found | {"metrics": metrics}


def read(path, *reports, record=None):
    return read_run(a_run(path / "run", [a_report(30), *reports], record), "run")


@pytest.mark.parametrize(
    ("settings", "metrics", "said"),
    [
        (
            {"target_drift": 0.2}, {"drift/rejected": 0.9409},
            "--target-drift 0.2 was not reached: on 4 validation pairs features move by 0.97 of "
            "their size, 4.8 times as far. `fpo-mlx fuse --target-drift` takes the part",
        ),
        ({"target_drift": 0.2, "init_adapter": "a"}, {"drift/rejected": 0.16}, "Lower --learning"),
        ({"target_kl": 3.0}, {"kl/rejected": 1.2}, "it is 1.2 nats, 0.4 times as far. Train long"),
        ({"target_kl": 3.0}, {"kl/rejected": 4.2}, None),  # so few pairs cannot tell
        ({"target_kl": 3.0}, {"kl/rejected": 3.2}, None),
        ({"target_drift": 0.2}, {"drift/rejected": 0.0361}, None),
        ({"target_drift": 0.2}, {"drift/rejected": 0.0}, None),  # before the first update
    ],
)  # fmt: skip
def test_a_target_that_was_missed_is_said_with_what_helps(tmp_path, settings, metrics, said):
    """A run of too few validation pairs is not landed, and nothing named its target."""
    end = a_validation(30, metrics, pairs=4)
    run = read(tmp_path, end, record={"settings": settings})
    found = [line for line in verdict(run) if line.startswith("warning: --target")]
    assert found == [f"warning: {w.text}" for w in warnings([run]) if "--target" in w.text]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_of_enough_pairs_ten_percent_is_what_a_target_may_be_missed_by(tmp_path):
    for kl, found in ((3.2, 0), (3.5, 1)):
        end = a_validation(30, {"kl/rejected": kl}, pairs=16)
        run = read(tmp_path / str(kl), end, record={"settings": {"target_kl": 3.0}})
        assert sum("--target-kl 3 was not reached" in line for line in verdict(run)) == found


def test_a_part_that_was_saved_and_is_still_too_far_misses_its_target(tmp_path):
    landed = a_validation(30, {"drift/rejected": 0.1282}) | {
        "kind": "landed", "part": 0.1, "figure": "drift", "before": 2, "after": 0.358, "target": 0.2
    }  # fmt: skip
    run = read(tmp_path, a_validation(30, {}), landed, record={"settings": {"target_drift": 0.2}})
    (said,) = (line for line in verdict(run) if line.startswith("warning: "))
    assert "on 40 validation pairs features move by 0.358 of their size, 1.8 times as far" in said


def fell(lost):
    return {"logps_per_token/chosen_change": -lost}


@pytest.mark.parametrize(
    ("validated", "said"),
    [(30, False), (20, True)],  # the second: training went on, and no validation saw that
)
def test_fallen_chosen_answers_are_those_of_the_validation_pairs_above(tmp_path, validated, said):
    """It took the worse of both, and denied the validation that stood two lines above."""
    reports = [a_validation(validated, fell(0.6)), a_report(30) | {"metrics": fell(1.1)}]
    run = read(tmp_path, *reports)
    assert any("lost 1.1 nats" in line for line in verdict(run)) is said
