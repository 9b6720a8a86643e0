"""Adapter folders as `train` leaves them, with and without malice, and a reader of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
SUMMARY = {
    "n": 40, "rewards/accuracies": 0.9, "rewards/accuracies/ci95": [0.8, 0.975],
    "rewards/margins": 0.02, "logps_per_token/chosen_change": -0.1,
    "features/chosen": 0.5, "features/rejected": 0.75, "kl/margin": -0.6,
    "rewards/accuracies/chosen_longer": 0.95, "rewards/accuracies/chosen_not_longer": 0.6,
}  # fmt: skip


def a_report(iteration: int, **metrics: float) -> dict[str, Any]:
    values = {
        "rewards/accuracies": 0.5 + iteration / 1000, "rewards/margins": iteration / 1000,
        "logps_per_token/chosen_change": -0.01, "logps_per_token/rejected_change": -0.02,
        "features/chosen": 0.5, "features/rejected": 0.75,
    }  # fmt: skip
    return {
        "kind": "train", "iteration": iteration, "loss": 0.7 - iteration / 1000,
        "metrics": values | metrics, "grad_norm": 0.5, "tokens_per_second": 100.0,
        "peak_memory_gb": 1.5, "warnings": [],
    }  # fmt: skip


def a_run(
    path: Path,
    reports: list[dict[str, Any]] | None = None,
    record: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """An adapter folder as `train` leaves it, with results of other commands."""
    path.mkdir(parents=True)
    settings = {"objective": "fpo", "model": "m", "sae": ["s"], "data": "pairs", "iters": 30,
                "beta": 0.1, "alpha": 0.5, "constraint": "features", "stop_gradient": True,
                "learning_rate": 2e-5}  # fmt: skip
    plain = {
        "settings": settings,
        "fingerprints": {"model": "a" * 64, "saes": [["b" * 64, "resid_post of block 27"]]},
        "versions": {"mlx": "0.32.4"},
    }
    (path / "run.json").write_text(json.dumps(record or plain))
    keys = [f"model.layers.{b}.mlp.up_proj" for b in (3, 4, 5)]
    lora = {"rank": 8, "scale": 20.0, "keys": keys}
    (path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": lora})
    )
    lines = [a_report(i) for i in (10, 20, 30)] if reports is None else reports
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind, value in results.items():
        (path / f"{kind}.json").write_text(json.dumps(value))
    return path


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def evil_runs(root: Path) -> list[Path]:
    """Two runs in which every place that can hold text holds markup."""
    names = ["<script>alert(1)</script>".replace("/", "∕"), 'b" onload="x']
    record = {
        "settings": {"objective": EVIL, EVIL: EVIL, "model": EVIL, "data": EVIL, "sae": [EVIL],
                     "beta": EVIL, "constraint": EVIL},
        "fingerprints": {EVIL: EVIL, "saes": [[EVIL, EVIL]]}, "versions": {EVIL: EVIL},
    }  # fmt: skip
    feature = {"index": EVIL, "label": EVIL, "tokens": [EVIL], EVIL: 1.0,
               "url": "javascript:alert(1)", "other": "https://evil.example/x"}  # fmt: skip
    shown = {
        "evaluate": {"summary": SUMMARY | {EVIL: 1.0}, "base": {"summary": {EVIL: 2.0}}},
        "features": {"features": [feature]},
        "compare": {"prompts": [{"prompt": EVIL, "answers": {"base": EVIL, EVIL: EVIL}}]},
    }
    reports = [a_report(10) | {"warnings": [EVIL]}, a_report(20)]
    return [a_run(root / name, reports, record, **shown) for name in names]
