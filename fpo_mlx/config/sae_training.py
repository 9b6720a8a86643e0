"""The settings of `fpo-mlx sae train`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fpo_mlx.config.fields import COUNTABLE, setting
from fpo_mlx.errors import ConfigError


@dataclass(frozen=True)
class SaeTrainConfig:
    """None means: chosen from the model, the data and the budget."""

    model: str = setting(
        "", "model folder or hub id", "model and SAE", first=True, path=True, by_content=True
    )
    data: str = setting(
        "",
        "whatever train takes, or .txt: texts, chats or preference pairs",
        "data",
        first=True,
        path=True,
        by_content=True,
    )
    output: str = setting(
        "sae", "folder to write", "saving", first=True, path=True, may_change=True
    )
    layer: int | None = setting(
        None,
        "block to read, from 0 (default: at nine tenths of the depth)",
        "model and SAE",
        first=True,
    )
    site: str = setting("resid_post", "site within the block", "model and SAE")
    init: str | None = setting(
        None,
        "SAE to start from (folder, file or hub id), in place of random weights",
        "model and SAE",
        first=True,
        path=True,
        by_content=True,
    )
    sae_format: str | None = setting(
        None, "family of --init's files (default: recognised)", "model and SAE", sae_files=True
    )
    sae_k: int | None = setting(
        None, "k of a top-k --init whose files do not hold it", "model and SAE", sae_files=True
    )
    norm_scaling_factor: float | None = setting(
        None, "scale of --init's inputs, where its files do not hold it", "model and SAE",
        sae_files=True,
    )  # fmt: skip
    llama_scope_gate: Literal["authors", "saelens"] = setting(
        "authors", "how --init is gated, if it is a Llama Scope", "model and SAE", sae_files=True
    )
    allow_pickle: bool = setting(
        False, "read --init from .pt files; only tensors are read", "safety", sae_files=True,
        may_change=True,
    )  # fmt: skip
    data_kind: Literal["auto", "text", "chat", "pairs"] = setting(
        "auto", "what the rows are", "data"
    )
    tokens: Literal["all", "response"] = setting("all", "positions to train on", "data")
    max_seq_length: int = setting(1024, "longest document, in tokens", "data", first=True)
    chat_template: str | None = setting(
        None, "file with a chat template, in place of the model's", "data", path=True,
        by_content=True,
    )  # fmt: skip
    chat_template_args: dict = setting(
        {}, 'variables of the chat template, as JSON: {"enable_thinking": false}', "data"
    )
    prompt_feature: str = setting("prompt", "name of the prompt column", "data")
    chosen_feature: str = setting("chosen", "name of the chosen column", "data")
    rejected_feature: str = setting("rejected", "name of the rejected column", "data")
    system_feature: str = setting("system", "name of the system column", "data")
    train_split: str | None = setting(None, "split of a hub dataset to train on", "data")
    subset: str | None = setting(None, "configuration of a hub dataset that has several", "data")
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
        None,
        "time to train for; sets the tokens (default 30)",
        "schedule",
        first=True,
        may_change=True,
        instead_of="training_tokens",
    )
    training_tokens: int | None = setting(
        None,
        "tokens to train on, in place of --minutes",
        "schedule",
        first=True,
        instead_of="minutes",
    )
    passes: float = setting(8.0, "most passes over the data", "schedule", may_change=True)
    batch_size: int = setting(2048, "tokens per update", "schedule")
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
    wired_share: float = setting(
        0.75,
        "part of Metal's working set that stays wired while it trains; 0 for none",
        "memory",
        may_change=True,
    )
    store: str | None = setting(
        None,
        "folder to keep the activations in, and to read them from",
        "memory",
        first=True,
        path=True,
        may_change=True,
    )
    held_out: float = setting(0.05, "share of the data to judge on, 65536 tokens at most", "data")
    seed: int = setting(0, "seed of weights and order", "schedule")
    save_every: int = setting(200, "updates between checkpoints", "saving", may_change=True)
    steps_per_report: int = setting(20, "updates between reports", "saving", may_change=True)
    resume: bool = setting(
        False,
        "continue the run in --output exactly where it stopped",
        "saving",
        first=True,
        may_change=True,
    )
    overwrite: bool = setting(False, "replace an older run in --output", "saving", may_change=True)
    trust_remote_code: bool = setting(
        False, "let the model folder run its own Python code", "safety", may_change=True
    )
    peer_timeout: float = setting(
        600.0, "seconds to wait for the other processes of a launcher before giving up", "safety",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        faults = [
            f"--{f.name.replace('_', '-')} {value}: wanted more than 0."
            for f in dataclasses.fields(self)
            if f.name not in ("layer", "seed", "held_out", "wired_share")
            and isinstance(value := getattr(self, f.name), int | float)
            and not isinstance(value, bool)
            and not value > 0
        ]
        faults += [
            f"--{name.replace('_', '-')} {value:g}: wanted less than {COUNTABLE:g}."
            for name in ("minutes", "passes", "memory_gb")
            if (value := getattr(self, name)) is not None and not value < COUNTABLE
        ]
        if not 0 <= self.held_out < 1:
            faults.append(f"--held-out {self.held_out}: wanted a share from 0 to below 1.")
        readings = ("sae_format", "sae_k", "norm_scaling_factor")
        if self.init is None and any(getattr(self, name) is not None for name in readings):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in readings)
            faults.append(f"{names} say how --init is read; --init is missing.")
        if not 0 <= self.wired_share <= 1:
            faults.append(f"--wired-share {self.wired_share:g}: wanted 0 to 1.")
        if self.resume and self.overwrite:
            faults.append("--resume and --overwrite exclude each other; give one.")
        if self.seed < 0:
            faults.append(f"--seed {self.seed}: wanted 0 or more.")
        if self.minutes is not None and self.training_tokens is not None:
            faults.append("--minutes and --training-tokens exclude each other; give one.")
        if self.max_seq_length == 1:
            faults.append("--max-seq-length 1: wanted 2 or more.")
        if faults:
            raise ConfigError("\n".join(faults))
