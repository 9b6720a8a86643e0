"""scripts/studies/control_margin.py: rates at equal margin, and what counts as the behaviour."""

from __future__ import annotations

import control_margin
import pytest


def point(kind, margin, rates):
    return {"kind": kind, "seed": 0, "margin": margin, "rates": rates}


def test_rates_are_compared_at_the_margin_that_all_reach_by_hand():
    """fpo goes 0 -> 0.4 over a margin of 2, so 0.1 at 0.5, where `held` ends, with 0.1 as well."""
    points = [
        point("base", 0.0, [0.0, 0.0]),
        point("fpo", 1.0, [0.2, 0.2]), point("fpo", 2.0, [0.4, 0.4]),
        point("held", 0.5, [0.1, 0.1]), point("held", 0.25, [0.0, 0.1]),
        point("out", 1.0, [0.0, 0.0]),
    ]  # fmt: skip
    found = control_margin.equal_margin(points, draws=50)
    assert found["margin"] == 0.5
    assert found["rates"]["fpo"] == pytest.approx([0.1, 0.1, 0.1])
    assert found["less than fpo"]["held"] == pytest.approx([0.0, 0.0, 0.0])
    assert found["less than fpo"]["out"] == pytest.approx([0.1, 0.1, 0.1])


def test_a_seed_that_lacks_a_kind_is_left_out():
    whole = [point("base", 0.0, [0.0]), point("fpo", 1.0, [0.2]), point("held", 1.0, [0.1])]
    begun = [{**p, "seed": 1, "rates": [0.9]} for p in whole[:2]]
    found = control_margin.equal_margin([*whole, *begun], draws=10)
    assert found["rates"]["fpo"] == pytest.approx([0.2, 0.2, 0.2])
    assert control_margin.equal_margin([*whole[:2], {**whole[2], "seed": 1}], draws=10) == {}


@pytest.mark.parametrize(
    ("text", "offers"),
    [("Here it is. Would you like more?", True), ("Done. Let me know if that helps!", True),
     ("What is it? It is a cat.", False), ("Feel free to ask.\n", True)],
)  # fmt: skip
def test_an_offer_or_a_question_is_one_at_the_end(text, offers):
    assert control_margin.shows(text, "offer") is offers
