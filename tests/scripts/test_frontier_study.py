"""The frontier study: its rewards, its meter on a tiny model, and what its comparison computes."""

from __future__ import annotations

import json

import frontier as study
import frontier_rewards as known
import frontier_show as show
import numpy as np
import pytest
import tiny_models
from command_line import BLOCK, random_sae

mx = pytest.importorskip("mlx.core")

from helpers import random_adapters  # noqa: E402

from fpo_mlx.config import Sampling  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.storage import files  # noqa: E402


def test_no_thing_of_a_held_out_prompt_is_in_a_training_prompt():
    assert len(set(known.training_prompts())) == 400
    assert len(set(known.held_out_prompts())) == 128
    assert not set(known.ALL[-known.HELD_OUT :]) & set(known.ALL[: -known.HELD_OUT])


def test_cells_of_the_results_are_kept_on_another_machine_and_those_at_hand_stay(tmp_path):
    run = {"method": "dpo", "rate": 1e-4, "seed": 2, "points": [{"reward": 0.5}]}
    results = tmp_path / "frontier-sentiment.json"
    study.restore(tmp_path / "work", study.kept(results))  # nothing measured yet
    files.write_json(results, {"base": {"reward": 0.1}, "runs": [run], "compared": []})
    study.restore(tmp_path / "work", study.kept(results))
    assert json.loads((tmp_path / "work" / "base.json").read_text()) == {"reward": 0.1}
    place = tmp_path / "work" / "cells" / study.Cell("dpo", 1e-4, 2).id / "points.json"
    assert json.loads(place.read_text()) == run
    files.write_json(place, own := {**run, "points": []})
    study.restore(tmp_path / "work", study.kept(results))
    assert json.loads(place.read_text()) == own


def test_the_rival_and_ours_come_first_on_all_seeds_and_nothing_twice():
    plan = list(study.cells(3, [], NOTHING))
    assert len(plan) == len(set(plan)) == len(study.METHODS) * (3 + len(study.RATES) - 1)
    first = plan[: 3 * len(study.FIRST)]
    assert {(c.method, c.seed) for c in first} == {(m, s) for m in study.FIRST for s in range(3)}
    assert [c.method for c in study.cells(1, ["simpo"], NOTHING)] == ["simpo"] * len(study.RATES)


def test_a_better_rate_is_run_on_all_seeds_once_all_rates_were_tried():
    usual, low, high = study.RATES
    tried = [measured(usual, 0, 0.5), measured(low, 0, 0.7)]
    plan = list(study.cells(3, ["dpo"], {"base": BASE, "runs": tried}))
    assert [c.seed for c in plan if c.rate == low] == [0]
    tried.append(measured(high, 0, 0.6))
    plan = list(study.cells(3, ["dpo"], {"base": BASE, "runs": tried}))
    assert [c.seed for c in plan if c.rate == low] == [0, 1, 2]
    assert [c.seed for c in plan if c.rate == high] == [0]


def test_a_rate_counts_once_it_was_run_on_as_many_seeds_as_any():
    usual, low, _ = study.RATES
    runs = [measured(usual, 0, 0.5), measured(usual, 1, 0.5), measured(low, 0, 0.7)]
    found = show.lines_of(runs, BASE)["dpo"]
    assert {seed: line[-1]["reward"] for seed, line in found.items()} == {0: 0.5, 1: 0.5}
    found = show.lines_of([*runs, measured(low, 1, 0.7)], BASE)["dpo"]
    assert {seed: line[-1]["reward"] for seed, line in found.items()} == {0: 0.7, 1: 0.7}


NOTHING = {"runs": []}
BASE = {"kl": 0.0, "reward": 0.1, "reward/of_prompts": [0.1]}


def measured(rate, seed, reward):
    point = {"part": 1.0, "kl": 4.0, "reward": reward, "reward/of_prompts": [reward]}
    return {"method": "dpo", "rate": rate, "seed": seed, "points": [point]}


def test_answers_elsewhere_are_counted_by_hand():
    sums = [want if i % 2 else f"It is 1{want}." for i, (_, want) in enumerate(known.SUMS)]
    assert known.right_sums(sums) == 0.5
    lists = ["- a\n- b\n- c", *["- a\n- b\n", "a\n- b\n- c\n- d"] * 9, "none"]
    assert known.right_formats(lists) == pytest.approx(10 / 20)


def open_meter(monkeypatch, tmp_path):
    import frontier_points as points

    for name, few in (("UNRELATED", known.UNRELATED[:3]), ("SUMS", known.SUMS[:2])):
        monkeypatch.setattr(known, name, few)
    monkeypatch.setattr(known, "FORMATS", known.FORMATS[:2])
    monkeypatch.setattr(points, "TOKENS", 8)
    monkeypatch.setattr(points, "GREEDY", Sampling(max_tokens=6, temp=0.0))
    monkeypatch.setattr(known, "held_out_prompts", lambda: ["Why?", "How so?"] * 2)
    monkeypatch.setattr(known, "REWARDS", {"letters": lambda prompt, answer: len(answer)})
    model = tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    return points.Meter(model, random_sae(32, BLOCK), "letters")


def test_the_base_is_where_the_base_is_and_so_is_an_adapter_taken_by_no_part(monkeypatch, tmp_path):
    meter = open_meter(monkeypatch, tmp_path)
    base = meter.point(None)
    folder = adapter(tmp_path)
    nothing, whole = meter.point(folder, 0.0), meter.point(folder)
    for point in (base, nothing):
        assert point["kl"] == pytest.approx(0, abs=1e-3)
        assert point["greedy_agreement/of_prompts"] == [1, 1, 1]
        assert point["unrelated_drift"] == pytest.approx(0, abs=1e-5)
        assert point["greedy_agreement"] == 1
    assert nothing["reward"] == base["reward"]
    assert whole["kl"] > 0.1
    assert whole["unrelated_drift"] > 1e-3
    each = np.array(whole["unrelated_drift/of_prompts"])
    assert np.sqrt(np.mean(each**2)) == pytest.approx(whole["unrelated_drift"], abs=1e-3)


def adapter(tmp_path):
    """Random adapters on both blocks."""
    from fpo_mlx.model.load import load_model

    loaded = load_model(tmp_path / "model")
    _, keys = adapters.adapted_paths(loaded.model, None, 1, None)
    spec = adapters.AdapterSpec("lora", 2, 4, 2.0, 0.0, keys)
    adapters.attach(loaded.model, spec)
    values = {k: mx.array(v) for k, v in random_adapters(loaded.model, 0.3).items()}
    adapters.save(tmp_path / "adapter" / "adapters.safetensors", values)
    files.write_json(tmp_path / "adapter" / "adapter_config.json", spec.as_config("model"))
    return tmp_path / "adapter"


def line(*points):
    return [
        {
            "kl": kl, "reward": r, "reward/of_prompts": [r, r + 1.0], "part": 1.0,
            "update": n, "unrelated_drift": kl / 10, "greedy_agreement": 1 - kl / 10,
        }
        for n, (kl, r) in enumerate(points)
    ]  # fmt: skip


def test_between_two_points_a_figure_goes_by_the_root_of_the_kl():
    run = line((1.0, 0.0), (4.0, 1.0), (16.0, 5.0))
    np.testing.assert_allclose(show.at(run, 2.25), [0.5, 1.5])
    np.testing.assert_allclose(show.at(run, 16.0), [5.0, 6.0])
    assert show.at(run, 0.5) is None
    assert show.at(run, 20.0) is None


def test_the_gap_at_equal_kl_is_ours_less_the_rivals_of_the_same_seed(monkeypatch):
    monkeypatch.setattr(show, "LEVELS", (1.0,))
    ours = {0: line((0.0, 0.0), (1.0, 1.0)), 1: line((0.0, 0.0), (4.0, 6.0))}
    theirs = {0: line((0.0, 0.5), (4.0, 0.5)), 1: line((0.0, 0.0), (4.0, 0.0))}
    (row,) = show.against({"fpo": ours, show.RIVAL: theirs}, "fpo")
    assert (row["kl"], row["seeds"], row["reward"]) == (1.0, 2, 1.75)
    assert (row["reward/interval"], row["reward/of_seeds"]) == ([0.5, 3.0], [0.5, 3.0])
    off = 12.7062 * 1.25  # Student's t of one degree of freedom, times the standard error
    assert row["reward/t"] == pytest.approx([1.75 - off, 1.75 + off], rel=1e-5)
    assert row["unrelated_drift"] == pytest.approx(((0.1**2 + 0.2**2) / 2) ** 0.5 - 0.2)
    assert row["greedy_agreement"] == pytest.approx(0.2 - (0.1 + 0.2) / 2)
    assert "greedy_agreement/interval" not in row  # no prompt's figure was kept


def test_a_drift_over_prompts_is_a_root_mean_square_with_its_interval(monkeypatch):
    monkeypatch.setattr(show, "LEVELS", (4.0,))
    lines = []
    for drifts in ([0.3, 0.4], [0.1, 0.2]):
        run = line((0.0, 0.0), (4.0, 1.0))
        for point, each in zip(run, ([0.0, 0.0], drifts), strict=True):
            point["unrelated_drift/of_prompts"] = each
        lines.append({0: run})
    (row,) = show.against({"fpo": lines[0], show.RIVAL: lines[1]}, "fpo")
    assert row["unrelated_drift"] == pytest.approx((0.25 / 2) ** 0.5 - (0.05 / 2) ** 0.5)
    alone = 0.2  # of either prompt
    assert row["unrelated_drift/interval"] == pytest.approx([row["unrelated_drift"], alone])
    table = show.markdown("plain", {**lines[0][0][0], **dict.fromkeys(show.SHOWN, 0.0)}, [], [row])
    drift = "+0.195 [+0.195, +0.200]"
    assert f"| fpo | dpo | 4 | 1 | +0.000 [+0.000, +0.000] | {drift} | +0.000 | +0.00 |  |" in table


def test_ours_is_compared_with_the_rival_and_with_its_free_twin(tmp_path):
    others = dict.fromkeys(show.SHOWN, 0.0) | {"update": 24}

    def run(method, reward):
        found = measured(1e-4, 0, reward)
        return found | {"method": method, "points": [others | found["points"][0]]}

    work = tmp_path / "plain"
    for i, found in enumerate([run("dpo", 0.2), run("fpo free", 0.3), run("fpo drift .8", 0.6)]):
        files.write_json(work / "cells" / str(i) / "points.json", found)
    files.write_json(work / "base.json", others | BASE)
    show.write(work, tmp_path / "out")
    rows = json.loads((tmp_path / "out.json").read_text())["compared"]
    at_two = {(r["method"], r["rival"]): r["reward"] for r in rows if r["kl"] == 2.0}
    step = 0.5**0.5  # of the way to a KL of 4, by its root
    assert at_two == pytest.approx(
        {
            ("fpo free", "dpo"): 0.1 * step,
            ("fpo drift .8", "dpo"): 0.4 * step,
            ("fpo drift .8", "fpo free"): 0.3 * step,
        }
    )


def test_what_one_of_them_never_reaches_is_not_compared(monkeypatch):
    monkeypatch.setattr(show, "LEVELS", (1.0, 5.0))
    far, near = {0: line((0.0, 0.0), (9.0, 1.0))}, {0: line((0.0, 0.0), (4.0, 1.0))}
    for ours, theirs in ((far, near), (near, far)):
        assert [r["kl"] for r in show.against({"fpo": ours, show.RIVAL: theirs}, "fpo")] == [1.0]


def test_parts_of_a_change_are_a_line_from_the_base():
    base = {"kl": 1e-6, "reward": 0.1, "reward/of_prompts": [0.1], "unrelated_drift": 0.0}
    points = [
        {"update": 24, "part": part, "kl": kl, "reward/of_prompts": [kl]}
        for part, kl in ((1.0, 9.0), (0.25, 1.0), (0.5, 3.0))
    ]
    run = {"method": "dpo", "rate": 1e-4, "seed": 0, "points": points}
    assert [p["part"] for p in show.lines_of([run], base)["dpo"][0]] == [0.0, 0.25, 0.5, 1.0]


def test_elsewhere_the_base_is_itself_at_every_prompt():
    """Its own figures were kept before those of prompts were."""
    point = {"update": 24, "part": 1.0, "kl": 4.0, "greedy_agreement/of_prompts": [0.2, 0.6]}
    run = {"method": "dpo", "rate": 1e-4, "seed": 0, "points": [point]}
    start, _ = show.lines_of([run], {"kl": 0.0})["dpo"][0]
    assert start["greedy_agreement/of_prompts"] == [1.0, 1.0]
    assert start["unrelated_drift/of_prompts"] == [0.0, 0.0]


def test_a_run_without_a_point_is_no_line():
    run = {"method": "dpo", "rate": 1e-4, "seed": 0, "points": []}
    assert show.lines_of([run], {"kl": 0.0}) == {}


def test_of_two_rates_the_better_one_counts_where_both_have_been():
    """One that goes further is not better for that."""
    far = {0: line((0.0, 0.0), (4.0, 0.2), (100.0, 3.0))}
    near = {0: line((0.0, 0.0), (4.0, 0.5))}
    assert show._best({1e-4: far, 5e-5: near}) == 5e-5
    assert show._best({1e-4: far}) == 1e-4
