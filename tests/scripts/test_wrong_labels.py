"""scripts/studies/wrong_labels.py: a result that is kept is not lost to a run of other settings."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

import wrong_labels

SETTINGS = {"sae": "topk", "iters": 300}


def asked(sae: str, output: Path | None = None) -> Namespace:
    return Namespace(sae=Path("saes") / sae, output=output, share=0.1, seeds=3)


def test_each_sae_has_a_result_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(wrong_labels, "RESULTS", tmp_path)
    places = [wrong_labels.place_of(asked(sae), SETTINGS) for sae in ("topk", "jumprelu")]
    assert [place.name for place in places] == ["wrong_labels_topk.json",
                                                "wrong_labels_jumprelu.json"]  # fmt: skip


@pytest.mark.parametrize(
    "kept",
    [
        {"share": 0.1},
        {"share": 0.2, "settings": SETTINGS},
        {"share": 0.1, "settings": SETTINGS | {"iters": 150}},
    ],
)
def test_a_result_of_other_settings_is_refused_and_left_as_it_is(tmp_path, kept):
    place = tmp_path / "kept.json"
    place.write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match=r"kept\.json.*--output") as refusal:
        wrong_labels.place_of(asked("topk", place), SETTINGS)
    assert "'iters': 300" in str(refusal.value)
    assert json.loads(place.read_text()) == kept


def test_a_result_of_the_same_settings_is_written_anew(tmp_path):
    place = tmp_path / "kept.json"
    place.write_text(json.dumps({"share": 0.1, "settings": SETTINGS, "seeds": [{}]}))
    assert wrong_labels.place_of(asked("topk", place), SETTINGS) == place


def test_a_result_of_more_seeds_is_refused(tmp_path):
    place = tmp_path / "kept.json"
    place.write_text(json.dumps({"share": 0.1, "settings": SETTINGS, "seeds": [{}] * 4}))
    with pytest.raises(SystemExit, match=r"kept\.json has 4 seeds, and these are 3"):
        wrong_labels.place_of(asked("topk", place), SETTINGS)
