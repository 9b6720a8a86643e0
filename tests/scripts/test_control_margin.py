"""scripts/studies/control_margin.py: rates at equal margin, and what counts as the behaviour."""

from __future__ import annotations

import json

import control_margin
import pytest
from control_margin import BASE, FREE, KINDS
from texts import Steps

CURVES = {  # margin at each of PARTS: a quarter, a half, the whole
    FREE: [0.4, 0.8, 1.6], "held": [0.1, 0.2, 0.4], "held, unrelated": [0.2, 0.4, 0.8],
    "out": [0.4, 0.3, 0.5], "out, unrelated": [0.4, 0.8, 1.6],
}  # fmt: skip
PARTS = {FREE: 0.25, "held": 1.0, "held, unrelated": 0.5, "out": 0.25, "out, unrelated": 0.25}


def point(kind, rates, seed=0, margin=0.4):
    level = 0.0 if kind == BASE else 1.0
    about = {"kind": kind, "seed": seed, "level": level, "margin": margin, "part": 1.0}
    return about | {"rates": rates}


def test_every_kind_answers_at_the_part_that_has_the_margin_of_all_and_none_twice(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(control_margin, "trained", lambda o, base, kind, seed: kind)
    monkeypatch.setattr(control_margin, "margins", lambda base, adapter: CURVES[adapter])

    def rates(o, base, adapter, part, seed):
        asked.append((adapter, part, seed))
        return [part / 10, part / 10]

    monkeypatch.setattr(control_margin, "rates", rates)
    o = control_margin.parse(["--levels", "1"])
    for _ in range(2):
        control_margin.one_seed(o, {}, Steps(tmp_path, {}), seed=3)
    assert asked == [*((kind, PARTS[kind], 3) for kind in KINDS), (None, 0.0, 3)]
    found = json.loads((tmp_path / "compared.json").read_text())["at 1"]
    assert found["margin"] == pytest.approx(0.4)
    assert found["parts"] == PARTS
    assert found["gaps"]["fpo less held"] == pytest.approx([0.025 - 0.1] * 3)
    assert found["gaps"]["held, unrelated less held"] == pytest.approx([0.05 - 0.1] * 3)
    assert found["gaps"]["fpo less base"] == pytest.approx([0.025] * 3)


@pytest.mark.parametrize(
    ("curve", "margin", "part"),
    [([0.4, 0.8, 1.6], 0.2, 1 / 8), ([0.4, 0.8, 1.6], 1.2, 0.75), ([0.3, 0.1, 0.2], 0.2, 1 / 6)],
)
def test_a_part_lies_where_the_margin_is_first_reached_by_hand(curve, margin, part):
    assert control_margin.part_at(curve, margin) == pytest.approx(part)


def test_a_kind_that_learned_nothing_ends_the_study():
    with pytest.raises(SystemExit, match="learned"):
        control_margin.reached_by_all(CURVES | {"out": [-0.1, 0.0, -0.2]})


def test_a_seed_that_lacks_a_kind_is_left_out():
    whole = [point(kind, [0.2, 0.4]) for kind in KINDS]
    begun = [{**p, "seed": 1, "rates": [0.9, 0.9]} for p in whole[:2]]
    found = control_margin.compared([*whole, *begun], 1.0)
    assert found["seeds"] == 1
    mean, low, high = found["rates"][FREE]
    assert mean == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.2, 0.4))  # both prompts drawn alike
    assert "fpo less base" not in found["gaps"]
    assert control_margin.compared(whole[:2], 1.0) == {}


def test_a_margin_is_what_both_sides_gained_by_hand():
    def side(logp, ref_logp, tokens):
        return {"logp": logp, "ref_logp": ref_logp, "tokens": tokens}

    pairs = [
        {"chosen": side(-4.0, -6.0, 4), "rejected": side(-9.0, -8.0, 2)},
        {"chosen": side(-4.0, -4.0, 1), "rejected": side(-4.0, -4.0, 8)},
    ]
    assert control_margin.margin_of(pairs) == pytest.approx((0.5 + 0.5) / 2)


@pytest.mark.parametrize(
    ("text", "opens"),
    [("Certainly! Below is one.", True), (" Here’s a poem", True), ("Here are three ways", True),
     ("Hereby it ends. Here is one.", False), ("Surely not", False)],
)  # fmt: skip
def test_an_opening_is_what_an_answer_begins_with(text, opens):
    assert control_margin.shows(text, "opening") is opens
