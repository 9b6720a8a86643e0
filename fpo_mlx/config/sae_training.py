"""The settings of `fpo-mlx sae train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fpo_mlx.config.fields import COUNTABLE, out_of_bounds, refuse, setting


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
        None,
        "k of a top-k --init whose files do not hold it",
        "model and SAE",
        sae_files=True,
        above=0,
    )
    norm_scaling_factor: float | None = setting(
        None, "scale of --init's inputs, where its files do not hold it", "model and SAE",
        sae_files=True, above=0
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
    max_seq_length: int = setting(1024, "longest document, in tokens", "data", first=True, least=2)
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
        None,
        "features (default: about 8 times the hidden size)",
        "model and SAE",
        first=True,
        above=0,
    )
    k: int | None = setting(
        None,
        "active features a token (default: 32, or 64 for wide models)",
        "model and SAE",
        first=True,
        above=0,
    )
    minutes: float | None = setting(
        None,
        "time to train for; sets the tokens (default 30)",
        "schedule",
        first=True,
        may_change=True,
        instead_of="training_tokens",
        above=0,
        below=COUNTABLE,
    )
    training_tokens: int | None = setting(
        None,
        "tokens to train on, in place of --minutes",
        "schedule",
        first=True,
        instead_of="minutes",
        above=0,
    )
    passes: float = setting(
        8.0, "most passes over the data", "schedule", may_change=True, above=0, below=COUNTABLE
    )
    batch_size: int = setting(2048, "tokens per update", "schedule", above=0)
    micro_batch_size: int | None = setting(
        None, "tokens in memory at once (default: the batch)", "memory", above=0
    )
    learning_rate: float | None = setting(
        None, "highest (default: 3e-3, less above 4096 features)", "schedule", above=0
    )
    centre: Literal["geometric_median", "mean"] = setting(
        "geometric_median", "start of b_dec", "schedule"
    )
    aux_k: int | None = setting(
        None, "dead features a token revives (default: half the hidden size)", "schedule", above=0
    )
    dead_after: int | None = setting(
        None, "tokens without a use (default: a sixtieth of the tokens)", "schedule", above=0
    )
    bandwidth: float = setting(
        0.1, "of JumpReLU's gradient, in units of the scaled activations", "schedule", above=0
    )
    memory_gb: float = setting(
        2.0, "bound of the activations in memory", "memory", above=0, below=COUNTABLE
    )
    wired_share: float = setting(
        0.75,
        "part of Metal's working set that stays wired while it trains; 0 for none",
        "memory",
        may_change=True,
        least=0,
        most=1,
    )
    store: str | None = setting(
        None,
        "folder to keep the activations in, and to read them from",
        "memory",
        first=True,
        path=True,
        may_change=True,
    )
    held_out: float = setting(
        0.05, "share of the data to judge on, 65536 tokens at most", "data", least=0, below=1
    )
    seed: int = setting(0, "seed of weights and order", "schedule", least=0)
    save_every: int = setting(
        200, "updates between checkpoints", "saving", may_change=True, above=0
    )
    steps_per_report: int = setting(
        20, "updates between reports", "saving", may_change=True, above=0
    )
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
        may_change=True, above=0
    )  # fmt: skip

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        readings = ("sae_format", "sae_k", "norm_scaling_factor")
        if self.init is None and any(getattr(self, name) is not None for name in readings):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in readings)
            faults.append(f"{names} say how --init is read; --init is missing.")
        if self.resume and self.overwrite:
            faults.append("--resume and --overwrite exclude each other; give one.")
        if self.minutes is not None and self.training_tokens is not None:
            faults.append("--minutes and --training-tokens exclude each other; give one.")
        refuse(faults)
