"""The settings of `fpo-mlx sae train`: every default and check, once; and what is derived."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fpo_mlx import config
from fpo_mlx.config.fields import setting
from fpo_mlx.errors import ConfigError


@dataclass(frozen=True)
class SaeTrainConfig:
    """None means: chosen from the model, the data and the budget."""

    model: str = setting("", "model folder or hub id", "model and SAE", first=True)
    data: str = setting(
        "", ".jsonl, .txt, folder or hub id: texts, chats or preference pairs", "data", first=True
    )
    output: str = setting("sae", "folder to write", "saving", first=True)
    layer: int | None = setting(
        None,
        "block to read, from 0 (default: at nine tenths of the depth)",
        "model and SAE",
        first=True,
    )
    site: str = setting("resid_post", "site within the block", "model and SAE")
    data_kind: Literal["auto", "text", "chat", "pairs"] = setting(
        "auto", "what the rows are", "data"
    )
    tokens: Literal["all", "response"] = setting("all", "positions to train on", "data")
    max_seq_length: int = setting(1024, "longest document, in tokens", "data", first=True)
    chat_template: str | None = setting(
        None, "file with a chat template, in place of the model's", "data"
    )
    architecture: Literal["topk", "batchtopk", "jumprelu"] = setting(
        "topk", "kind of SAE", "model and SAE", first=True
    )
    matryoshka: bool = setting(
        False, "nested prefixes of features, each to reconstruct alone", "model and SAE"
    )
    width: int | None = setting(
        None, "features (default: about 8 times the hidden size)", "model and SAE", first=True
    )
    k: int | None = setting(
        None,
        "active features a token (default: 32, or 64 for wide models)",
        "model and SAE",
        first=True,
    )
    minutes: float | None = setting(
        None, "time to train for; sets the tokens (default 30)", "schedule", first=True
    )
    training_tokens: int | None = setting(
        None, "tokens to train on, in place of --minutes", "schedule", first=True
    )
    passes: float = setting(8.0, "most passes over the data", "schedule")
    batch_size: int = setting(2048, "tokens an update", "schedule")
    micro_batch_size: int | None = setting(
        None, "tokens in memory at once (default: the batch)", "memory"
    )
    learning_rate: float | None = setting(
        None, "highest (default: 3e-3, less above 4096 features)", "schedule"
    )
    centre: Literal["geometric_median", "mean"] = setting(
        "geometric_median", "start of b_dec", "schedule"
    )
    aux_k: int | None = setting(
        None, "dead features a token revives (default: half the hidden size)", "schedule"
    )
    dead_after: int | None = setting(
        None, "tokens without a use (default: a sixtieth of the tokens)", "schedule"
    )
    bandwidth: float = setting(
        0.1, "of JumpReLU's gradient, in units of the scaled activations", "schedule"
    )
    memory_gb: float = setting(2.0, "bound of the activations in memory", "memory")
    store: str | None = setting(
        None, "folder to keep the activations in, and to read them from", "memory", first=True
    )
    held_out: float = setting(0.05, "share of the data to judge on, 65536 tokens at most", "data")
    seed: int = setting(0, "seed of weights and order", "schedule")
    save_every: int = setting(200, "updates between checkpoints", "saving")
    steps_per_report: int = setting(20, "updates between reports", "saving")
    resume: bool = setting(
        False, "continue the run in --output exactly where it stopped", "saving", first=True
    )
    trust_remote_code: bool = setting(
        False, "let the model folder run its own Python code", "safety"
    )

    def __post_init__(self) -> None:
        faults = [
            f"--{f.name.replace('_', '-')} {value}: wanted more than 0."
            for f in dataclasses.fields(self)
            if f.name not in ("layer", "seed", "held_out")
            and isinstance(value := getattr(self, f.name), int | float)
            and not isinstance(value, bool)
            and not value > 0
        ]
        if not 0 <= self.held_out < 1:
            faults.append(f"--held-out {self.held_out}: wanted a share from 0 to below 1.")
        if self.seed < 0:
            faults.append(f"--seed {self.seed}: wanted 0 or more.")
        if self.minutes is not None and self.training_tokens is not None:
            faults.append("--minutes and --training-tokens exclude each other; give one.")
        if self.max_seq_length == 1:
            faults.append("--max-seq-length 1: wanted 2 or more.")
        if faults:
            raise ConfigError("\n".join(faults))


# what may differ between the two halves of a resumed run; a store may have moved, not come or gone
FREE = {
    "output", "resume", "minutes", "passes", "store",
    "save_every", "steps_per_report", "trust_remote_code",
}  # fmt: skip


def load_settings(flags: Mapping[str, Any], path: Path | None = None) -> SaeTrainConfig:
    """Flags over a YAML file over defaults. Raises ConfigError for unknown keys and bad values."""
    given = config.read_yaml(path) if path else {}
    hints = typing.get_type_hints(SaeTrainConfig)
    if unknown := sorted(set(given) - set(hints)):
        raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}.")
    given |= {name: value for name, value in flags.items() if value is not None}
    return SaeTrainConfig(**{n: config.coerce(n, v, hints[n]) for n, v in given.items()})


@dataclass(frozen=True)
class Sizes:
    """What a run needs of numbers, settled."""

    layer: int
    width: int
    k: int
    aux_k: int


def sizes(settings: SaeTrainConfig, model: Mapping[str, Any], hidden: int) -> Sizes:
    """Block, width and k from the model alone.

    The block lies at nine tenths of the depth: FPO's authors found late blocks best (2411.07618,
    section 5), and adapters are put below it. Width is the power of two at or below 8 hidden
    sizes.

    Raises ConfigError for what does not fit together.
    """
    n = int(model["num_hidden_layers"])
    layer = n - 1 - max(1, round(n / 15)) if settings.layer is None else settings.layer
    if not 0 <= layer < n:
        raise ConfigError(f"--layer {layer}: the model's blocks are 0 to {n - 1}.")
    width = settings.width or 1 << (8 * hidden).bit_length() - 1
    k = settings.k or min(32 if hidden < 1024 else 64, width // 4)
    if k >= width:
        raise ConfigError(f"--k {k}: wanted fewer than --width {width}.")
    if settings.matryoshka and width % 8:
        raise ConfigError(f"--matryoshka: wanted a --width that 8 divides, found {width}.")
    return Sizes(layer, width, k, min(settings.aux_k or hidden // 2, width))


def learning_rate(settings: SaeTrainConfig, width: int) -> float:
    """3e-3 up to 4096 features, then falling with the root of the width (2406.04093, B.3)."""
    return settings.learning_rate or 3e-3 * min(1.0, (4096 / width) ** 0.5)


def prefixes(settings: SaeTrainConfig, width: int) -> tuple[int, ...]:
    """Ends of the nested prefixes: an eighth, a quarter, half, all."""
    return (width // 8, width // 4, width // 2, width) if settings.matryoshka else (width,)


def steps_in_time(
    seconds: float, *, per_row: float, per_token: float, available: int, reused: bool
) -> int:
    """Tokens that can be trained on in `seconds`.

    per_row: seconds for one activation; per_token: seconds of training a token; available: rows
    of one pass; reused: whether a second pass needs no new activations.
    """
    both = seconds / (per_row + per_token)
    if both <= available or not reused:
        return int(both)
    return int(available + (seconds - available * (per_row + per_token)) / per_token)
