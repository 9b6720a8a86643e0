"""The README's picture shows the study's figures."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import drift_picture as dp
import pytest


def cell(name, accuracy, chosen, rejected, group="method", learned=0.5):
    summary = {"rewards/accuracies": accuracy, "kl/chosen": chosen, "kl/rejected": rejected}
    summary |= {"logps_per_token/chosen_change": -0.25}
    summary |= {"logps_per_token/rejected_change": -0.25 - learned}
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
    found = dp.methods({"cells": cells})
    assert found == {"fpo": [(0.8, 0.5, 3), (1.0, 0.5, 3)], "dpo": [(0.9, 0.5, 42)]}
    assert list(found) == ["fpo", "dpo"]


@pytest.mark.parametrize(
    ("panel", "middle"), [(dp.ACCURACY, 0.75), (dp.MARGIN, 0.1**0.5), (dp.KL, 10)]
)
def test_the_axes_place_their_ends_and_their_middle(panel, middle):
    ends = panel.ticks[0], panel.ticks[-1]
    assert [panel.place(x) for x in ends] == pytest.approx([panel.left, panel.right])
    assert panel.place(middle) == pytest.approx((panel.left + panel.right) / 2)


def test_a_row_says_its_means_and_draws_the_range_over_its_seeds():
    cells = [cell("fpo", 0.75, 9, 11, learned=0.25), cell("fpo", 0.85, 29, 31, learned=0.5)]
    picture = ElementTree.fromstring(dp.draw({"cells": cells}))
    words = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[-4:] == ["FPO", "0.80", "0.38", "20"]
    x = [
        (float(d.get("x1")), float(d.get("x2")))
        for d in picture.iter("{http://www.w3.org/2000/svg}line")
    ]
    ends = ((dp.ACCURACY, 0.75, 0.85), (dp.MARGIN, 0.25, 0.5), (dp.KL, 10, 30))
    for drawn, (panel, low, high) in zip(x[-3:], ends, strict=True):
        assert drawn == pytest.approx((panel.place(low), panel.place(high)), abs=0.1)


def test_a_method_whose_run_was_stopped_says_so():
    picture = dp.draw({"cells": [cell("simpo", 0.9, 300, 340), cell("dpo", 0.9, 4, 4)]})
    assert ">SimPO, stopped<" in picture
    assert ">DPO<" in picture
    assert ">320<" in picture
