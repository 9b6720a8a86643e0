"""scripts/studies/blocks.py on a tiny model: each place has its SAE and its run, none twice."""

from __future__ import annotations

import json

import blocks
import pytest
import tiny_models
from command_line import ROWS, lines


def test_every_place_is_trained_and_judged_once(tmp_path, monkeypatch):
    llama = tiny_models.tiny_llama(tmp_path / "llama", tokenizer=True)
    texts = lines(
        tmp_path / "text.jsonl", *({"text": f"poem {i * i} of sea {i}"} for i in range(60))
    )
    for name in ("train", "valid"):
        lines(tmp_path / "data" / f"{name}.jsonl", *ROWS)
    words = ["--model", llama, "--data", tmp_path / "data", "--texts", texts, "--blocks", 1, 2,
             "--sites", "resid_post", "mlp_out", "--width", 64, "--k", 6, "--tokens", 640,
             "--sae-batch-size", 64, "--iters", 2, "--top-k", 5, "--seeds", 1, "--work",
             tmp_path / "work", "--output", tmp_path / "found.json"]  # fmt: skip
    blocks.main([str(word) for word in words])
    found = json.loads((tmp_path / "found.json").read_text())
    places = ["resid_post-1", "mlp_out-1", "resid_post-2", "mlp_out-2"]
    assert list(found["saes"]) == places
    assert all(0 < one["fvu"] < 2 for one in found["saes"].values())
    assert [row["kind"] for row in found["table"]] == ["dpo", *places]
    for run in found["runs"]:
        assert ("features/chosen" in run) == (run["kind"] != "dpo")
        assert 0 <= run["rewards/accuracies"] <= 1
    adapted = {run["kind"]: run["adapted_blocks"] for run in found["runs"]}
    assert adapted["resid_post-1"] == 2 < adapted["resid_post-2"] == 3
    monkeypatch.setattr(blocks, "cell", lambda *_: pytest.fail("a cell ran again"))
    monkeypatch.setattr(blocks, "train_sae", lambda *_: pytest.fail("an SAE was trained again"))
    blocks.main([str(word) for word in words])


def test_the_table_by_hand():
    runs = [{"kind": "dpo", "seed": s, "rewards/margins": v} for s, v in enumerate((1.0, 2.0, 6.0))]
    (row,) = blocks.table(runs)
    assert row == {"kind": "dpo", "seeds": 3, "rewards/margins": [3.0, 1.0, 6.0]}
