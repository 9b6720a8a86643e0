"""The torch backend runs where nothing held pip to the versions that were tried, and says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fpo_mlx.errors import pip_install
from fpo_mlx.machine import upstream
from fpo_mlx.pipeline import store


@pytest.mark.parametrize(("backend", "times"), [("torch", 1), ("mlx", 0)])
@pytest.mark.parametrize(("version", "inside"), [("4.57.0", False), ("5.24.0", True)])
def test_a_version_that_nobody_tried_is_said_before_the_reference_runs(
    backend, times, version, inside, monkeypatch
):
    lines = ["transformers<5.25,>=5.21", "mlx-lm<0.33"]
    requirements = [upstream.Requirement(line) for line in lines]
    monkeypatch.setattr(upstream, "_requirements", lambda: requirements)
    installed = {"transformers": version, "mlx-lm": "0.40.0"}
    monkeypatch.setattr(upstream, "version", installed.get)
    engine = SimpleNamespace(notes=("read so",))
    monkeypatch.setattr(store, "open_backend", lambda *_, **__: engine)
    names = ("dtype", "tokens_per_batch", "share_prompt", "trust_remote_code")
    config = SimpleNamespace(reference=SimpleNamespace(**dict.fromkeys(names)))
    paths = dict.fromkeys(("model_path", "adapter", "device"))
    job: Any = SimpleNamespace(backend=backend, config=config, saes=(), projections=(), **paths)
    said: list[str] = []
    assert store.open_engine(job, say=said.append) is engine
    advice = pip_install("transformers>=5.21,<5.25")
    assert said == [
        *[
            "warning: transformers 4.57.0 is outside the versions that were tried "
            f"(>=5.21,<5.25), and may give other scores without a word: {advice}"
        ]
        * (0 if inside else times),
        "read so",
    ]
