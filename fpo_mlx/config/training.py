"""Settings of the training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fpo_mlx.config.fields import check_finite, check_positive, is_number, setting
from fpo_mlx.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. Names and defaults are mlx_lm.lora's wherever it has them."""

    adapter_path: str = setting(
        "adapters",
        "folder to write adapters and metrics to",
        "saving",
        first=True,
        path=True,
        may_change=True,
    )
    init_adapter: str | None = setting(
        None,
        "adapter that is the reference and the policy's start",
        "model and SAE",
        path=True,
        by_content=True,
    )
    reference: str | None = setting(
        None,
        "reference cache (default: one under the user cache)",
        "model and SAE",
        path=True,
        may_change=True,
    )
    iters: int | None = setting(
        None,
        "iterations of batch-size pairs (default 1000), rounded up to whole updates",
        "schedule",
        first=True,
        may_change=True,
        instead_of="epochs",
    )
    epochs: float | None = setting(
        None,
        "passes over the data, in place of --iters",
        "schedule",
        may_change=True,
        instead_of="iters",
    )
    batch_size: int = setting(4, "pairs per iteration", "schedule", first=True)
    grad_accumulation_steps: int = setting(1, "iterations per optimizer update", "schedule")
    micro_batch_size: int = setting(
        1,
        "pairs in memory at once; changes memory, time, rounding, and what dropout draws",
        "memory",
    )
    learning_rate: float = setting(
        1e-5, "learning rate", "schedule", first=True, instead_of="lr_schedule"
    )
    lr_schedule: dict | None = setting(
        None, "mlx-lm's block: {name, arguments, warmup, warmup_init}", "schedule", yaml_only=True
    )
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = setting(
        "adam", "optimizer", "schedule"
    )
    optimizer_config: dict = setting(
        {}, "arguments of the optimizer, by its name", "schedule", yaml_only=True
    )
    max_grad_norm: float | None = setting(
        1.0, "clip the gradient's global norm; 0 for never", "schedule"
    )
    fine_tune_type: Literal["lora", "dora"] = setting("lora", "kind of adapter", "adapters")
    num_layers: int | None = setting(
        None,
        "blocks to adapt, counted back from the SAE's (default 16, or all; -1 for all)",
        "adapters",
    )
    adapt_above_sae: bool = setting(
        False, "count --num-layers back from the last block instead", "adapters"
    )
    lora_parameters: dict = setting(
        {}, "rank (8), scale (20.0), dropout (0.0), keys", "adapters", yaml_only=True
    )
    project_out: str | None = setting(
        None,
        "file of features; no training pass sees their decoder directions, so none learns by them",
        "objective",
        path=True,
        may_change=True,
    )
    grad_checkpoint: bool = setting(
        False,
        "recompute activations: less memory, more time",
        "memory",
        first=True,
        may_change=True,
    )
    gradient: Literal["backward", "forward"] = setting(
        "backward",
        "forward: estimate it from two passes without gradient, in the memory of inference",
        "memory",
    )
    forward_rank: int = setting(2, "rank of a forward gradient's direction", "memory")
    forward_interval: int = setting(
        50, "updates that share one half of a forward gradient's direction", "memory"
    )
    forward_epsilon: float = setting(1e-3, "step of a forward gradient's two passes", "memory")
    seed: int = setting(0, "seed of adapters, dropout and data order", "schedule")
    steps_per_report: int = setting(10, "iterations between reports", "saving", may_change=True)
    steps_per_eval: int = setting(200, "iterations between validations", "saving", may_change=True)
    val_batches: int = setting(
        25, "batches of a validation, -1 for all, 0 for no validation", "saving", may_change=True
    )
    save_every: int = setting(
        100, "iterations between numbered checkpoints", "saving", may_change=True
    )
    resume: bool = setting(
        False,
        "continue the run in --adapter-path exactly where it stopped",
        "saving",
        first=True,
        may_change=True,
    )
    overwrite: bool = setting(
        False, "replace an older run in --adapter-path", "saving", may_change=True
    )
    land: bool = setting(
        True,
        "at the end save the part of the change that is nearest to --target-drift or --target-kl "
        "on the validation pairs",
        "saving",
        may_change=True,
    )
    report_to: str | None = setting(
        None, "wandb, tensorboard, or both with a comma", "saving", may_change=True
    )
    project_name: str | None = setting(
        None, "project name at the tracker", "saving", may_change=True
    )
    early_stopping: int | None = setting(
        None,
        "stop after so many validations in a row without a better loss",
        "safety",
        may_change=True,
    )
    on_divergence: Literal["stop", "skip"] = setting(
        "stop",
        "stop: end the run, exit code 4; skip: leave that update out and count it",
        "safety",
        may_change=True,
    )
    max_skipped_updates: int = setting(
        5, "updates left out in a row that end the run all the same", "safety", may_change=True
    )
    max_start_gap: float = setting(
        0.05,
        "refuse to start when |u| / beta is above this many nats per token (twice that in half "
        "precision): policy and reference differ",
        "safety",
        may_change=True,
    )
    peer_timeout: float = setting(
        600.0,
        "seconds to wait for the other processes of a launcher before giving up",
        "safety",
        may_change=True,
    )
    max_margin: float = setting(
        50.0, "largest |u| / beta of an update, in nats a token", "safety", may_change=True
    )
    max_logp_drop: float = setting(
        5.0,
        "most that the chosen log-prob may fall below the reference's, in nats a token of the "
        "update; few tokens count as 16",
        "safety",
        may_change=True,
    )
    max_feature_distance: float | None = setting(
        None,
        "largest D of an update; its scale is the SAE's, so there is no bound by default",
        "safety",
        may_change=True,
    )

    def __post_init__(self) -> None:
        check_positive(
            self, "batch_size", "grad_accumulation_steps", "micro_batch_size", "learning_rate",
            "steps_per_report", "steps_per_eval", "save_every", "max_margin", "max_logp_drop",
            "early_stopping", "max_skipped_updates", "max_feature_distance",
            "max_start_gap", "peer_timeout", "forward_rank", "forward_interval", "forward_epsilon",
        )  # fmt: skip
        check_finite(self, "learning_rate", "epochs")
        if self.iters is not None and self.epochs is not None:
            raise ConfigError("--iters and --epochs exclude each other; give one.")
        if self.iters is not None and self.iters < 1:
            raise ConfigError(f"--iters {self.iters}: wanted 1 or more.")
        if self.epochs is not None and self.epochs <= 0:
            raise ConfigError(f"--epochs {self.epochs:g}: wanted more than 0.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; give one.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: wanted 0 or more.")
        if self.val_batches < -1:
            raise ConfigError(f"--val-batches {self.val_batches}: wanted 0 or more, or -1 for all.")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise ConfigError(
                f"--max-grad-norm {self.max_grad_norm}: wanted more than 0, or 0 for no clipping."
            )
        if (self.epochs or 0) > 1e6:
            raise ConfigError(f"--epochs {self.epochs}: wanted a million at most.")
        unknown = set(self.lora_parameters) - {"rank", "scale", "dropout", "keys"}
        if unknown:
            hint = " mlx-lm uses scale, = alpha / rank." if "alpha" in unknown else ""
            raise ConfigError(
                f"lora_parameters: unknown {', '.join(sorted(unknown))}; "
                f"wanted rank, scale, dropout, keys.{hint}"
            )
        _check_lora(self.lora)

    @property
    def pairs_per_update(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.grad_accumulation_steps

    def whole_updates(self, iterations: int) -> int:
        """So many iterations, or the next number that makes whole updates."""
        return -(-iterations // self.grad_accumulation_steps) * self.grad_accumulation_steps

    def iterations(self, n_pairs: int) -> int:
        """Number of iterations for a training set of n_pairs: whole updates."""
        if self.epochs is not None:
            updates = math.ceil(n_pairs / self.pairs_per_update)
            return max(1, math.ceil(self.epochs * updates) * self.grad_accumulation_steps)
        return self.whole_updates(1000 if self.iters is None else self.iters)

    @property
    def lora(self) -> dict[str, Any]:
        return {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None, **self.lora_parameters}


def _check_lora(lora: Mapping[str, Any]) -> None:
    """Raises: ConfigError for values that lora_parameters cannot have, all at once."""
    rank, scale, dropout, keys = (lora[name] for name in ("rank", "scale", "dropout", "keys"))
    faults = []
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        faults.append(f"rank {rank!r}, wanted a whole number above 0")
    if not is_number(scale):
        faults.append(f"scale {scale!r}, wanted a number")
    if not is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"dropout {dropout!r}, wanted 0 or more and less than 1")
    texts = isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)
    if keys is not None and not texts:
        faults.append(f"keys {keys!r}, wanted a list of names such as self_attn.q_proj")
    if faults:
        raise ConfigError(f"lora_parameters: {'; '.join(faults)}.")
