"""scripts/studies/control_margin.py: rates at equal margin, and what counts as the behaviour."""

from __future__ import annotations

import json
from types import SimpleNamespace

import control_margin
import intervals
import numpy as np
import pytest
import texts
from command_line import lines
from control_margin_show import BASE, FAMILIES, FREE, compared, write
from texts import Steps

from fpo_mlx.records import ResponseScore

WHOLE = {FREE: 1.6, "held": 0.4, "held, unrelated": 0.8, "out": 1.2, "out, unrelated": 1.6}


def point(kind, rates, seed=0, way="held"):
    about = {"way": "", "kind": BASE, "seed": seed, "level": 0.0, "part": 0.0, "rates": rates}
    about["answers"] = {"tokens": 9.0}
    if kind == BASE:
        return about
    own = {"way": way, "kind": kind, "level": 1.0, "part": 1.0}
    return about | own | {"sides": [[-0.1, -0.4], [0.1, -0.4]]}


@pytest.fixture
def asked(monkeypatch):
    """Whose answers were sampled. A margin grows with the part here: least / whole is found."""
    asked = []
    monkeypatch.setattr(control_margin, "trained", lambda o, base, kind, seed: kind)
    monkeypatch.setattr(control_margin, "digest_of", lambda adapter: f"weights of {adapter}")
    monkeypatch.setattr(
        control_margin, "sides",
        lambda base, adapter, part: [
            (part * WHOLE[adapter] - 0.1, 0.0), (0.05, -part * WHOLE[adapter] - 0.05)
        ],
    )  # fmt: skip

    def answered(o, base, adapter, part, seed):
        asked.append((adapter, seed))
        name = f"at-{adapter}-{seed}".replace(", ", "-") if adapter else BASE
        texts.write_rows(control_margin.answers_of(o, name, seed, part), [])
        return {"rates": [part / 10, part / 10], "answers": {"tokens": 9.0}}

    monkeypatch.setattr(control_margin, "answered", answered)

    def read(base, path, point):
        same = ("way", "kind", "seed", "level")
        return {key: point[key] for key in same} | {"base_nats": 2.5}

    monkeypatch.setattr(control_margin, "read_by_base", read)
    return asked


def test_each_way_is_compared_at_the_margin_of_the_least_and_nothing_is_measured_twice(
    tmp_path, asked
):
    o = control_margin.parse(["--levels", "1", "--work", str(tmp_path)])
    for _ in range(2):
        control_margin.one_seed(o, {}, Steps(tmp_path, {}), seed=3)
    ways = [*FAMILIES["held"], *FAMILIES["out"]]  # `held alone` is at the parts of `held` here
    assert asked == [*((kind, 3) for kind in ways), (None, 3)]
    found = json.loads((tmp_path / "compared.json").read_text())
    for way, kinds in FAMILIES.items():
        here = found[f"{way} at 1"]
        least = min(WHOLE[kind] for kind in kinds)
        assert here["answers"][FREE] == [{"tokens": 9.0, "base_nats": 2.5}]
        for kind in kinds:
            assert here["margins"][kind] == [pytest.approx(least, rel=0.03)]
            (part,) = here["parts"][kind]
            assert part == pytest.approx(least / WHOLE[kind], rel=0.03)
            assert here["rates"][kind]["mean"] == pytest.approx(part / 10)
            assert here["chosen gained"][kind] == [pytest.approx((part * WHOLE[kind] - 0.05) / 2)]
            less = here["gaps"][f"{kind} less base"]["mean"]
            assert less == pytest.approx(part / 10 - 0.1)
        own = way.removesuffix(" alone")
        assert here["gaps"][f"fpo less {own}"]["mean"] == pytest.approx(
            (here["parts"][FREE][0] - here["parts"][own][0]) / 10
        )
    assert found["held at 1"]["parts"]["held"] == [1.0]
    free = [found[f"{way} at 1"]["parts"][FREE][0] for way in ("held", "out")]
    assert free[0] < 0.3 < 0.7 < free[1]


def test_what_was_trained_anew_is_not_put_to_what_was_measured_before(tmp_path, monkeypatch, asked):
    o = control_margin.parse(["--family", "out", "--work", str(tmp_path)])
    steps = Steps(tmp_path, {})
    control_margin.one_seed(o, {}, steps, seed=0)
    (steps.folder / "out-0-by-out-at-1.json").unlink()
    monkeypatch.setattr(control_margin, "digest_of", lambda adapter: "others")
    with pytest.raises(SystemExit, match=r"out is not what out-0-whole.json was measured with"):
        control_margin.one_seed(o, {}, steps, seed=0)


def test_a_family_by_itself_measures_no_kind_of_others(tmp_path, asked):
    o = control_margin.parse(["--family", "out", "--work", str(tmp_path)])
    control_margin.one_seed(o, {}, Steps(tmp_path, {}), seed=0)
    assert asked == [*((kind, 0) for kind in FAMILIES["out"]), (None, 0)]
    assert set(json.loads((tmp_path / "compared.json").read_text())) == {"out at 1"}


def test_a_kind_that_learned_nothing_leaves_its_own_way_out_and_no_other(
    tmp_path, monkeypatch, asked, capsys
):
    monkeypatch.setitem(WHOLE, "out", -0.1)
    o = control_margin.parse(["--levels", "1", "--work", str(tmp_path)])
    control_margin.one_seed(o, {}, Steps(tmp_path, {}), seed=3)
    assert "seed 3, out: a kind of it did not learn" in capsys.readouterr().err
    assert asked == [*((kind, 3) for kind in FAMILIES["held"]), (None, 3)]
    assert set(json.loads((tmp_path / "compared.json").read_text())) == {
        "held at 1", "held alone at 1"
    }  # fmt: skip


def test_a_seed_that_lacks_a_kind_is_left_out():
    whole = [point(kind, [0.2, 0.4]) for kind in FAMILIES["held"]]
    begun = [{**p, "seed": 1, "rates": [0.9, 0.9]} for p in whole[:2]]
    found = compared([*whole, *begun], "held", 1.0)
    assert found["seeds"] == 1
    rate = found["rates"][FREE]
    assert rate["mean"] == pytest.approx(0.3)
    assert rate["drawn"] == pytest.approx([0.2, 0.4])  # both prompts drawn alike
    assert rate["of_seeds"] == [pytest.approx(0.3)]
    assert "t" not in rate
    assert "fpo less base" not in found["gaps"]
    assert compared(whole, "out", 1.0) == {}
    assert compared(whole[:2], "held", 1.0) == {}


def test_gaps_have_the_interval_of_seeds_and_prompts_drawn_anew():
    """Both seeds and all prompts agree on the gap to `held`, so nothing is uncertain in it."""
    points = [point(BASE, [0.1, 0.2], seed) for seed in (0, 1)]
    for kind, off in zip(FAMILIES["held"], (0.3, 0.1, 0.3), strict=True):
        points += [point(kind, [0.1 + off, 0.2 + off], seed) for seed in (0, 1)]
    gaps = compared(points, "held", 1.0)["gaps"]
    of = {
        "fpo less held": 0.2, "fpo less held, unrelated": 0.0, "held less held, unrelated": -0.2,
        "fpo less base": 0.3, "held less base": 0.1,
    }  # fmt: skip
    for name, by in of.items():
        for figure in ("drawn", "t", "of_seeds"):
            assert gaps[name][figure] == pytest.approx([by] * 2)


def test_the_interval_over_seeds_is_student_s_by_hand():
    """Gaps of .1, .2, .6: mean .3, deviation √.07, and t of 2 degrees of freedom is 4.3027."""
    ours = np.array([[0.1, 0.1], [0.2, 0.2], [0.6, 0.6]])
    found = intervals.gap(ours, 0 * ours)
    off = 4.3027 * (0.07 / 3) ** 0.5
    assert found["mean"] == pytest.approx(0.3)
    assert found["t"] == pytest.approx([0.3 - off, 0.3 + off], rel=1e-4)
    assert found["of_seeds"] == pytest.approx([0.1, 0.2, 0.6])


def test_a_margin_is_what_both_sides_gained_by_hand():
    def side(logp, ref_logp, tokens):
        return {"logp": logp, "ref_logp": ref_logp, "tokens": tokens}

    pair = {"chosen": side(-4.0, -6.0, 4), "rejected": side(-9.0, -8.0, 2)}
    chosen, rejected = texts.gains(pair)
    assert chosen - rejected == pytest.approx(0.5 + 0.5)


def test_the_base_reads_two_answers_of_each_prompt_and_its_nats_are_per_token(
    tmp_path, monkeypatch
):
    class Tokenizer:
        def prompt_tokens(self, turns):
            return [len(turns[0]["content"])]

        def encode(self, texts):
            return [list(range(len(text))) for text in texts]

    def scores(pairs):
        (pair,) = pairs
        return [[ResponseScore(-2.0 * len(side), len(side)) for side in pair.responses]]

    opened = SimpleNamespace(tokenizer=Tokenizer(), reader=SimpleNamespace(scores=scores))
    monkeypatch.setattr("fpo_mlx.api.open_model", lambda model: opened)
    answers = [("p", 0, "abc"), ("p", 1, "d"), ("p", 2, "not read"), ("q", 0, "e"), ("q", 1, "")]
    lines(
        tmp_path / "answers.jsonl",
        *({"prompt": p, "answer": n, "text": text} for p, n, text in answers),
    )
    seen = control_margin.read_by_base(
        {"model": "m"}, tmp_path / "answers.jsonl", point(FREE, [0.1]) | {"part": 0.5}
    )
    assert seen == {"way": "held", "kind": FREE, "seed": 0, "level": 1.0, "base_nats": 2.0}


def test_what_the_base_makes_of_the_answers_stands_beside_their_rates(tmp_path):
    steps = Steps(tmp_path, {})
    for kind in FAMILIES["out"]:
        one = point(kind, [0.2], way="out")
        steps(f"{kind}-point", lambda one=one: one)
        same = {name: one[name] for name in ("way", "kind", "seed", "level")}
        steps(f"{kind}-read", lambda same=same: same | {"base_nats": 4.5})
    write(steps)
    found = json.loads((tmp_path / "compared.json").read_text())["out at 1"]
    assert found["answers"][FREE] == [{"tokens": 9.0, "base_nats": 4.5}]
