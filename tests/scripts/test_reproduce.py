"""scripts/studies/reproduce.py: every cell on a tiny model, resuming, the reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("matplotlib")
pytest.importorskip("torch")  # makes the tiny model

import reproduce
import reproduce_cells as rc
import reproduce_show


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The whole study on the tiny model, once: (work, output)."""
    root = tmp_path_factory.mktemp("reproduce")
    words = ["--smoke", "--work", str(root / "work"), "--output", str(root / "out")]
    assert reproduce.main(words) == 0
    return root / "work", root / "out"


def test_every_method_and_ablation_gives_its_row_figures_and_reading(smoke):
    _, out = smoke
    results = json.loads((out / "results.json").read_text())
    cells = {c["name"]: c for c in results["cells"]}
    assert results["left"] == []
    assert {"base", *rc.METHODS} <= set(cells)
    assert {"fpo alpha 0.1", "fpo no stop-gradient", "fpo top-k 2", "fpo activations", "fpo mlp",
            "fpo no constraint"} <= set(cells)  # fmt: skip
    assert {c["status"] for c in cells.values()} <= {"done", "diverged"}
    assert cells["base"]["training"] is None
    assert cells["fpo mlp"]["sae"] == "mlp"
    for name in rc.METHODS:
        assert cells[name]["training"]["updates"] == 4
        assert {"kl/margin", "features/chosen", "answers/entropy"} <= set(cells[name]["summary"])
    text = (out / "results.md").read_text()
    assert all(f"| {name}" in text for name in cells)
    assert "## Reading" in text
    assert text.count("holds") + text.count("does not hold") >= 6
    assert {p.name for p in out.glob("*.svg")} == {
        "tradeoff.svg", "distances.svg", "alpha.svg", "cost.svg"
    }  # fmt: skip


def test_every_method_trains_on_the_same_pairs_updates_and_blocks(smoke):
    work, out = smoke
    kept = [json.loads(p.read_text()) for p in work.rglob("cells/*/adapters/run.json")]
    assert len(kept) == len(json.loads((out / "results.json").read_text())["cells"]) - 1
    same = ("data", "iters", "batch_size", "learning_rate", "max_seq_length", "seed")
    assert len({tuple(run["settings"][k] for k in same) for run in kept}) == 1
    assert len({run["fingerprints"]["data"] for run in kept}) == 1
    first = [
        p for p in work.rglob("cells/*/adapters/adapter_config.json") if "fpo-mlp" not in str(p)
    ]
    assert len({json.dumps(json.loads(p.read_text())["lora_parameters"]) for p in first}) == 1


def test_every_cell_is_judged_by_the_same_rewards_and_the_same_d(smoke):
    """`evaluate` would judge each by its own training's: DPO by sums, SimPO with beta 2."""
    work, out = smoke
    judged = [json.loads(p.read_text())["objective"] for p in work.rglob("cells/*/evaluate.json")]
    assert len(judged) == len(json.loads((out / "results.json").read_text())["cells"])
    for key in ("preset", "beta", "length_normalize", "top_k", "feature_scale"):
        assert len({one[key] for one in judged}) == 1, key
    assert judged[0]["preset"] == "fpo"


def test_finished_cells_are_not_run_again(smoke, monkeypatch):
    work, out = smoke
    ran: list[str] = []
    monkeypatch.setattr(reproduce, "in_process", lambda words, log: ran.append(words[0]) or 0)
    before = (out / "results.md").read_text()
    assert reproduce.main(["--smoke", "--work", str(work), "--output", str(out)]) == 0
    assert set(ran) == {"precompute"}
    after = (out / "results.md").read_text()
    drop = lambda text: [line for line in text.splitlines() if "time:" not in line]  # noqa: E731
    assert drop(after) == drop(before)


def plan_at(tmp_path: Path, **changes: Any) -> rc.Plan:
    saes = {"first": Path("s"), "second": Path("t")}
    return rc.Plan(Path("m"), saes, Path("d"), tmp_path, **changes)


def test_a_part_that_is_run_alone_leaves_the_rest_in_the_results(smoke, tmp_path):
    work, out = smoke
    words = ["--smoke", "--work", str(work), "--only", "fpo", "--output", str(tmp_path)]
    assert reproduce.main(words) == 0
    assert (tmp_path / "results.md").read_text().split("## Methods")[1] == (
        out / "results.md"
    ).read_text().split("## Methods")[1]


def test_the_smoke_run_keeps_away_from_the_results_that_are_checked_in(smoke, monkeypatch):
    work, _ = smoke
    monkeypatch.setattr(reproduce, "RESULTS", work / "checked-in")
    assert reproduce.main(["--smoke", "--work", str(work), "--only", "fpo"]) == 0
    assert not (work / "checked-in").exists()
    assert (work / "smoke" / "results" / "results.json").exists()


def test_a_row_with_any_of_unicodes_line_ends_stays_one_row(tmp_path):
    rows = [{"prompt": f"a\u2028{i}\u0085b"} for i in range(3)]
    for name in ("train", "valid"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    folder = rc.write_data(tmp_path, tmp_path / "out", 3, 3)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert sorted((json.loads(line) for line in lines), key=str) == rows


def test_a_cell_of_other_settings_is_another_cell(tmp_path):
    fpo = next(c for c in rc.cells(plan_at(tmp_path)) if c.name == "fpo")
    places = {rc.place_of(plan_at(tmp_path, updates=n), fpo) for n in (10, 10, 20)}
    assert len(places) == 2


def test_cells_come_with_the_methods_first_and_seeds_last(tmp_path):
    cells = rc.cells(plan_at(tmp_path, seeds=3))
    assert [c.id for c in cells[:3]] == ["base.s0", "dpo.s0", "simpo.s0"]
    assert len({c.id for c in cells}) == len(cells)
    assert [c.seed for c in cells[-12:]] == [1] * 6 + [2] * 6
    assert {c.varies for c in cells if c.group == "ablation"} == {
        "alpha", "stop-gradient", "constraint", "feature scale", "top-k", "site"
    }  # fmt: skip


def fake(plan: rc.Plan, codes: dict[str, int]) -> tuple[rc.Run, list[list[str]]]:
    """A runner that leaves what train and evaluate leave, and ends with these codes."""
    seen: list[list[str]] = []

    def run(words: list[str], log: Path) -> int:
        seen.append(words)
        at = dict(zip(words, words[1:], strict=False))
        if words[0] == "train":
            folder = Path(at["--adapter-path"])
            (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
            (folder / "adapters.safetensors").touch()
            (folder / "checkpoint" / "state.safetensors").touch()
            metrics = {"rewards/accuracies": 0.5}
            line = {"kind": "train", "iteration": 3, "pairs_per_second": 0.5,
                    "peak_memory_gb": 1.25, "metrics": metrics}  # fmt: skip
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        elif not codes.get("evaluate"):
            Path(at["--json"]).write_text(json.dumps({"summary": {"n": 4}}))
        return codes.get(words[0], 0)

    return run, seen


def test_a_diverged_run_is_kept_as_that_and_evaluated(tmp_path):
    plan = plan_at(tmp_path)
    cell = rc.cells(plan)[1]
    run, _ = fake(plan, {"train": 4})
    record, _ = rc.run_cell(plan, cell, run)
    assert record is not None
    assert record["status"] == "diverged"
    assert record["training"]["seconds_per_pair"] == 2.0
    assert rc.finished(plan, cell) == record


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_failed_cell_is_not_kept_and_goes_on_from_its_checkpoint(tmp_path, command):
    plan = plan_at(tmp_path)
    cell = rc.cells(plan)[1]
    record, note = rc.run_cell(plan, cell, fake(plan, {command: 1})[0])
    assert record is None
    assert f"{command} ended with exit code 1" in note
    assert rc.finished(plan, cell) is None
    run, seen = fake(plan, {})
    assert rc.run_cell(plan, cell, run)[0] is not None
    assert seen[0][0] == "train"
    assert seen[0][-1] == "--resume"


def test_a_budget_that_is_over_begins_no_cell(tmp_path):
    plan = plan_at(tmp_path)
    run, seen = fake(plan, {})
    for jobs in (1, 2):
        assert list(reproduce.outcomes(plan, rc.cells(plan), run, jobs, deadline=0.0)) == []
    assert seen == []
    assert len(list(reproduce.outcomes(plan, rc.cells(plan)[:3], run, 2, None))) == 3


def a_record(name: str, accuracy: float, kl: float, d: float, seed: int = 0) -> dict[str, Any]:
    summary = {"n": 4, "rewards/accuracies": accuracy, "kl/margin": kl, "features/rejected": d}
    return {"name": name, "group": "method", "seed": seed, "status": "done", "training": None,
            "summary": summary}  # fmt: skip


def test_the_reading_says_what_holds_and_what_does_not():
    records = [
        a_record("dpo", 0.95, -2.0, 9.0), a_record("simpo", 0.9, 0.5, 0.1),
        a_record("fpo", 0.94, -1.0, 1.0), a_record("fpo", 0.92, -1.0, 3.0, seed=1),
    ]  # fmt: skip
    said = reproduce_show.reading(records)
    assert (
        said[0] == "FPO's accuracy within 2 points of the best: holds. fpo 0.930, best dpo 0.950."
    )
    assert "KL margin (size) below dpo's: holds. fpo -1, dpo -2." in said[1]
    assert "KL margin (size) below simpo's: does not hold" in said[2]
    assert "D of the rejected below dpo's: holds. fpo 2, dpo 9." in said[3]
    assert "below simpo's: does not hold" in said[4]
    records[2] = a_record("fpo", 0.9, -1.0, 1.0)
    assert "does not hold. fpo 0.910" in reproduce_show.reading(records)[0]


def test_the_table_gives_the_mean_and_half_the_range_of_the_seeds():
    records = [a_record("fpo", a, 1.0, 1.0, seed=i) for i, a in enumerate((0.5, 0.7, 0.9))]
    row = reproduce_show.table(records, ["fpo"])[-1]
    assert row.startswith("| fpo | 3 | 0.7 ± 0.2 |")


def test_the_table_gives_one_seed_its_interval_and_the_base_no_rewards():
    records = [a_record("fpo", 0.9, 1.0, 2.0), a_record("base", 0.0, 0.0, 0.0)]
    records[0]["summary"]["rewards/accuracies/ci95"] = [0.8312, 1.0]
    head, _, fpo, base = reproduce_show.table(records, ["fpo", "base"])
    assert [c.strip() for c in head.split("|")][3] == "accuracy"
    assert fpo.startswith("| fpo | 1 | 0.9 [0.831, 1] |")
    assert base.startswith("| base | 1 | – |")


def test_an_ablation_stands_beside_fpo_of_its_own_seeds():
    """The ablation has seed 0 only, on which FPO itself did worse than on the others."""
    records = [a_record("fpo", a, 1.0, 1.0, seed=i) for i, a in enumerate((0.6, 0.9, 0.9))]
    records.append(a_record("fpo no stop-gradient", 0.7, 1.0, 1.0) | {"group": "ablation"})
    page = reproduce_show.markdown({}, records, [])
    methods, ablations = page.split("## Ablations")
    assert "| fpo | 3 | 0.8 " in methods
    assert "| fpo | 1 | 0.6 " in ablations
    assert "does not cost accuracy: does not hold. With 0.600, without 0.700." in page


def test_the_list_runs_nothing(tmp_path, capsys):
    words = ["--smoke", "--list", "--work", str(tmp_path), "--only", "fpo", "--only", "base"]
    assert reproduce.main(words) == 0
    shown = capsys.readouterr().out.split()
    assert shown == ["to", "do", "base", "base.s0", "to", "do", "method", "fpo.s0"]
    assert not (tmp_path / "smoke" / "cells").exists()
