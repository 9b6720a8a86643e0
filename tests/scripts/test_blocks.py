"""scripts/studies/blocks.py on a tiny model: each place has its SAE and its run, none twice."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import blocks
import pytest
import tiny_models
from command_line import ROWS, lines
from texts import goes_on

from fpo_mlx.data.feature_files import read_weights
from fpo_mlx.errors import Diverged


def test_every_place_is_trained_and_judged_once(tmp_path, monkeypatch):
    llama = tiny_models.tiny_llama(tmp_path / "llama", tokenizer=True)
    texts = lines(
        tmp_path / "text.jsonl", *({"text": f"poem {i * i} of sea {i}"} for i in range(60))
    )
    lines(tmp_path / "data" / "train.jsonl", *ROWS, *ROWS)
    lines(tmp_path / "data" / "valid.jsonl", *ROWS)
    words = ["--model", llama, "--data", tmp_path / "data", "--texts", texts, "--blocks", 1, 2,
             "--sites", "resid_post", "mlp_out", "--width", 64, "--k", 6, "--tokens", 640,
             "--sae-batch-size", 64, "--iters", 4, "--top-k", 5, "--seeds", 1, "--pairs", 3,
             "--learning-rate", 2e-4, "--work", tmp_path / "work", "--output",
             tmp_path / "found"]  # fmt: skip
    blocks.main([str(word) for word in words])
    found = json.loads((tmp_path / "found" / "compared.json").read_text())
    places = ["resid_post-1", "mlp_out-1", "resid_post-2", "mlp_out-2"]
    assert set(found["saes"]) == set(places)
    assert all(0 < one["fvu"] < 2 for one in found["saes"].values())
    runs = {
        kind: json.loads((tmp_path / "found" / "steps" / f"{kind}-0.json").read_text())
        for kind in ("dpo", *places)
    }
    for kind, run in runs.items():
        assert [p["part"] for p in run["points"]] == list(blocks.PARTS)
        kls = [p["kl"] for p in run["points"]]
        assert kls == sorted(kls)
        assert kls[0] > 0
        assert all((p["drift"] is None) == (kind == "dpo") for p in run["points"])
        assert all(len(p[blocks.MARGIN]) == 3 for p in run["points"])
    assert runs["resid_post-1"]["adapted_blocks"] == 2 < runs["resid_post-2"]["adapted_blocks"] == 3
    variants = ["free", "chosen", "k10", "all", "logits"]
    beside = ["--vary", "resid_post-2", "--second", "resid_post-1", "--variants", *variants]
    blocks.main([str(word) for word in (*words, *beside)])
    for variant in (*variants, "resid_post-1"):
        run = json.loads(
            (tmp_path / "found" / "steps" / f"resid_post-2+{variant}-0.json").read_text()
        )
        assert run["points"] != runs["resid_post-2"]["points"], variant
    of_all = {
        name: tmp_path / "work" / f"{name}-sae-resid_post-2.csv" for name in ("all", "logits")
    }
    for variant, (name, wanted) in {
        "free": ("alpha", 0.0), "chosen": ("stop_gradient", False), "k10": ("top_k", 10),
        **{name: ("feature_weights", str(path)) for name, path in of_all.items()},
        "resid_post-1": ("sae", [str(tmp_path / "work" / f"sae-resid_post-{n}") for n in (2, 1)]),
    }.items():  # fmt: skip
        run = json.loads((tmp_path / "work" / f"run-resid_post-2+{variant}-0/run.json").read_text())
        assert run["settings"][name] == wanted
        assert run["settings"]["target_drift"] == (None if variant == "free" else 0.3)
    alike, by_logits = (list(read_weights(path, [64])[0].values()) for path in of_all.values())
    assert alike == [1.0] * 64
    assert sum(by_logits) / 64 == pytest.approx(1.0)
    assert len(set(by_logits)) > 60
    monkeypatch.setattr(blocks, "cell", lambda *_: pytest.fail("a cell ran again"))
    monkeypatch.setattr(blocks, "train_sae", lambda *_: pytest.fail("an SAE was trained again"))
    blocks.main([str(word) for word in words])
    shutil.rmtree(tmp_path / "work")  # as on another machine
    blocks.main([str(word) for word in words])


def test_at_equal_kl_a_margin_is_compared_with_dpos_of_the_same_seeds():
    def run(kind, seed, *points):
        return {
            "kind": kind, "seed": seed, "points": [
                {"kl": kl, blocks.MARGIN: [m - 0.1, m + 0.1], "chosen_change": -m}
                for kl, m in points
            ],
        }  # fmt: skip

    runs = [
        run("dpo", 0, (4.0, 1.0)), run("dpo", 1, (4.0, 3.0)),
        run("resid_post-9", 0, (1.0, 0.8), (2.0, 1.0)), run("resid_post-9", 1, (0.5, 1.0)),
    ]  # fmt: skip
    dpo, dpo_at_3, place = blocks.table(runs)
    assert (dpo["kind"], dpo["kl"], dpo["seeds"]) == ("dpo", 1.0, 2)
    assert dpo["margin"] == pytest.approx(1.0)  # half of 1 and of 3, by the root of the KL
    assert dpo["chosen_change"] == pytest.approx(-1.0)
    assert dpo_at_3["kl"] == 3.0
    assert (place["kind"], place["kl"], place["seeds"]) == ("resid_post-9", 1.0, 1)
    assert "above dpo" not in dpo
    assert place["above dpo"]["seeds"] == 1
    gap = place["above dpo"]["margin"]
    assert gap == pytest.approx(0.8 - 0.5)  # of seed 0, the other stays below
    assert place["above dpo"]["chosen_change"] == pytest.approx(-0.8 + 0.5)
    low, high = place["above dpo"]["interval"]
    assert low == pytest.approx(0.3 - 0.05)  # the rival's scatter is half of its own at KL 4
    assert high == pytest.approx(0.3 + 0.05)


def test_a_margin_by_sums_weighs_the_longer_answer_more_by_hand():
    """4 tokens gain 2 nats, 1 token loses 1: .5 + 1 per token, 2 + 1 by sums."""

    def side(logp, ref_logp, tokens):
        return {"logp": logp, "ref_logp": ref_logp, "tokens": tokens}

    pair = {"chosen": side(-4.0, -6.0, 4), "rejected": side(-9.0, -8.0, 1)}
    summary = {"rewards/accuracies": 1.0, "logps_per_token/chosen_change": 0.5}
    summary |= {"kl/chosen": 1.0, "kl/rejected": 3.0}
    found = blocks.point(SimpleNamespace(pairs=[pair], summary=summary, adapter_scale=0.5))
    assert (found[blocks.MARGIN], found["of_sums"], found["kl"]) == ([1.5], [3.0], 2.0)


def test_a_variant_is_compared_with_its_own_place():
    def run(kind, *margins):
        points = [{"kl": 1.0, blocks.MARGIN: list(margins), "chosen_change": 0.0}]
        return {"kind": kind, "seed": 0, "points": points}

    _, varied = blocks.table([run("mlp_out-9", 0.5, 0.7), run("mlp_out-9+k10", 0.6, 0.8)])
    assert set(varied) - {"kind", "kl", "seeds", "margin", "chosen_change"} == {"above mlp_out-9"}
    assert varied["above mlp_out-9"]["margin"] == pytest.approx(0.1)
    assert varied["above mlp_out-9"]["interval"] == pytest.approx([0.1, 0.1])


def test_a_run_that_the_guard_ends_is_kept_without_points(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise Diverged("iteration 3: not finite. The adapters are in /home/me.")

    monkeypatch.setattr(blocks.pipeline, "train", diverges)
    o = blocks.parse(["--model", "m", "--work", str(tmp_path)])
    found = blocks.cell(o, "dpo", 1)
    assert found["points"] == []
    assert found["diverged"] == "iteration 3: not finite"


def test_a_run_goes_on_from_its_checkpoint_or_anew_where_it_was_killed_before(tmp_path):
    assert goes_on(tmp_path) == {"resume": False, "overwrite": False}
    (tmp_path / "run.json").touch()
    assert goes_on(tmp_path) == {"resume": False, "overwrite": True}
    (tmp_path / "checkpoint").mkdir()
    assert goes_on(tmp_path)["overwrite"] is True
    (tmp_path / "checkpoint" / "state.safetensors").touch()
    assert goes_on(tmp_path) == {"resume": True, "overwrite": False}
