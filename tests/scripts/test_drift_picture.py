"""The README's picture shows the study's figures."""

from __future__ import annotations

import json
import statistics
from xml.etree import ElementTree

import drift_picture as dp
import pytest


def cell(name, accuracy, chosen, rejected, group="method"):
    summary = {"rewards/accuracies": accuracy, "kl/chosen": chosen, "kl/rejected": rejected}
    status = "diverged" if name == "simpo" else "done"
    return {"name": name, "group": group, "status": status, "summary": summary}


def test_the_committed_picture_is_drawn_from_the_committed_results():
    results = json.loads(dp.RESULTS.read_text(encoding="utf-8"))
    assert dp.PICTURE.read_text(encoding="utf-8") == dp.draw(results)


def test_methods_are_ordered_by_drift_and_ablations_are_left_out():
    cells = [
        cell("dpo", 0.9, 40, 44), cell("fpo", 0.8, 2, 4), cell("fpo", 1.0, 4, 2),
        cell("fpo alpha 2", 0.9, 1, 1, group="ablation"),
    ]  # fmt: skip
    assert dp.methods({"cells": cells}) == {"fpo": ([0.8, 1.0], [3, 3]), "dpo": ([0.9], [42])}


def test_the_axes_place_their_ends_and_their_middle():
    assert [dp.linear(x) for x in (0.5, 1.0)] == list(dp.LEFT)
    assert dp.linear(0.75) == statistics.fmean(dp.LEFT)
    assert [dp.logarithmic(x) for x in (0.1, 1000)] == pytest.approx(list(dp.RIGHT))
    assert dp.logarithmic(10) == pytest.approx(statistics.fmean(dp.RIGHT))


def test_a_row_says_its_means_and_draws_the_range_over_its_seeds():
    cells = [cell("fpo", 0.75, 9, 11), cell("fpo", 0.85, 29, 31)]
    picture = ElementTree.fromstring(dp.draw({"cells": cells}))
    words = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[-3:] == ["FPO", "0.80", "20"]
    x = [
        (float(d.get("x1")), float(d.get("x2")))
        for d in picture.iter("{http://www.w3.org/2000/svg}line")
    ]
    assert x[-2] == pytest.approx((dp.linear(0.75), dp.linear(0.85)), abs=0.1)
    assert x[-1] == pytest.approx((dp.logarithmic(10), dp.logarithmic(30)), abs=0.1)


def test_a_method_whose_run_was_stopped_says_so():
    picture = dp.draw({"cells": [cell("simpo", 0.9, 300, 340), cell("dpo", 0.9, 4, 4)]})
    assert ">SimPO, stopped<" in picture
    assert ">DPO<" in picture
    assert ">320<" in picture
