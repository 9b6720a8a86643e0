"""What a command starts from: which model, adapter and SAE its reference is of."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from command_line import ROWS, lines  # noqa: E402
from evaluated import place  # noqa: E402, F401

from fpo_mlx.config import load_config  # noqa: E402
from fpo_mlx.pipeline.job import open_job  # noqa: E402
from fpo_mlx.reference.weights import adapter_fingerprint  # noqa: E402


def test_a_reference_is_named_by_its_adapter_wherever_that_was_given(place, tmp_path):  # noqa: F811
    lines(tmp_path / "train.jsonl", *ROWS)
    words = {"model": str(place / "model"), "data": str(tmp_path), "objective": "dpo"}
    one, two = (str(place / name) for name in ("one", "two"))
    found = [
        open_job(load_config(words | more), say=lambda _: None, adapter=adapter).identity.adapter
        for more, adapter in (({}, None), ({}, one), ({"init_adapter": one}, None), ({}, two))
    ]
    assert found[0] == "none"
    assert found[1:] == [adapter_fingerprint(place / name) for name in ("one", "one", "two")]
    assert len(set(found)) == 3
