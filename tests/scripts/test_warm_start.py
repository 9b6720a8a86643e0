"""scripts/studies/warm_start.py on a tiny model: the curve is made, kept, and gone on with."""

from __future__ import annotations

import json

import pytest
import tiny_models
import warm_start


def test_cold_and_warm_stand_side_by_side_and_nothing_runs_twice(tmp_path, monkeypatch):
    llama = tiny_models.tiny_llama(tmp_path / "llama", tokenizer=True)
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"poem {i * i} of the sea {i}"}) + "\n"
                            for i in range(80)))  # fmt: skip
    words = ["--model", llama, "--data", data, "--width", 64, "--k", 6, "--batch-size", 64,
             "--start-tokens", 2560, "--seeds", 2, "--work", tmp_path / "work", "--output",
             tmp_path / "found.json", "--tokens", 128, 640]  # fmt: skip
    warm_start.main([str(word) for word in words])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["kind"], row["tokens"], row["seeds"]) for row in found["means"]] == [
        ("cold", 128, 2), ("warm", 128, 2), ("cold", 640, 2), ("warm", 640, 2),
    ]  # fmt: skip
    assert found["as it is"]["fvu"] > found["means"][3]["fvu"]
    cold, warm = found["means"][:2]
    assert warm["fvu"] < cold["fvu"]
    monkeypatch.setattr(warm_start, "cell", lambda *_, **__: pytest.fail("a cell ran again"))
    warm_start.main([str(word) for word in words])


def test_means_and_ranges_by_hand():
    cells = [{"kind": "cold", "tokens": 8, "seed": s, "fvu": f, "l0": 4.0, "dead": 0.0}
             for s, f in enumerate((0.2, 0.5, 0.8))]  # fmt: skip
    (row,) = warm_start.means(cells)
    assert row["fvu"] == pytest.approx(0.5)
    assert row["fvu_range"] == [0.2, 0.8]
