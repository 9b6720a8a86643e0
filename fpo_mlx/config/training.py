"""Settings of the training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fpo_mlx.config.fields import is_number, out_of_bounds, refuse, setting


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
        least=1,
    )
    epochs: float | None = setting(
        None,
        "passes over the data, in place of --iters",
        "schedule",
        may_change=True,
        instead_of="iters",
        above=0,
        most=1e6,
    )
    batch_size: int = setting(4, "pairs per iteration", "schedule", first=True, above=0)
    grad_accumulation_steps: int = setting(
        1, "iterations per optimizer update", "schedule", above=0
    )
    micro_batch_size: int = setting(
        1,
        "pairs in memory at once; changes memory, time, rounding, and what dropout draws",
        "memory",
        above=0,
    )
    learning_rate: float = setting(
        1e-5,
        "learning rate",
        "schedule",
        first=True,
        instead_of="lr_schedule",
        above=0,
        below=math.inf,
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
        1.0, "clip the gradient's global norm; 0 for never", "schedule", least=0
    )
    fine_tune_type: Literal["lora", "dora"] = setting("lora", "kind of adapter", "adapters")
    num_layers: int | None = setting(
        None,
        "blocks to adapt, counted back from the SAE's (default 16, or all; -1 for all)",
        "adapters",
    )
    adapt_above_sae: bool = setting(
        False,
        "adapt what lies behind the SAE, too: --num-layers counts back from the last block",
        "adapters",
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
    forward_rank: int = setting(2, "rank of a forward gradient's direction", "memory", above=0)
    forward_interval: int = setting(
        50, "updates that share one half of a forward gradient's direction", "memory", above=0
    )
    forward_epsilon: float = setting(
        1e-3, "step of a forward gradient's two passes", "memory", above=0
    )
    seed: int = setting(0, "seed of adapters, dropout and data order", "schedule", least=0)
    steps_per_report: int = setting(
        10, "iterations between reports", "saving", may_change=True, above=0
    )
    steps_per_eval: int = setting(
        200, "iterations between validations", "saving", may_change=True, above=0
    )
    val_batches: int = setting(
        25,
        "batches of a validation, -1 for all, 0 for no validation",
        "saving",
        may_change=True,
        least=-1,
    )
    save_every: int = setting(
        100, "iterations between numbered checkpoints", "saving", may_change=True, above=0
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
        above=0,
    )
    on_divergence: Literal["stop", "skip"] = setting(
        "stop",
        "stop: end the run, exit code 4; skip: leave that update out and count it",
        "safety",
        may_change=True,
    )
    max_skipped_updates: int = setting(
        5,
        "updates left out in a row that end the run all the same",
        "safety",
        may_change=True,
        above=0,
    )
    max_start_gap: float = setting(
        0.05,
        "refuse to start when |u| / beta is above this many nats per token (twice that in half "
        "precision): policy and reference differ",
        "safety",
        may_change=True,
        above=0,
    )
    peer_timeout: float = setting(
        600.0,
        "seconds to wait for the other processes of a launcher before giving up",
        "safety",
        may_change=True,
        above=0,
    )
    max_margin: float = setting(
        50.0, "largest |u| / beta of an update, in nats a token", "safety", may_change=True, above=0
    )
    max_logp_drop: float = setting(
        5.0,
        "most that the chosen log-prob may fall below the reference's, in nats a token of the "
        "update; few tokens count as 16",
        "safety",
        may_change=True,
        above=0,
    )
    max_feature_distance: float | None = setting(
        None,
        "largest D of an update; its scale is the SAE's, so there is no bound by default",
        "safety",
        may_change=True,
        above=0,
    )

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        for one, other in (("iters", "epochs"), ("resume", "overwrite")):
            if getattr(self, one) and getattr(self, other):
                faults.append(f"--{one} and --{other} exclude each other; give one.")
        refuse(faults + _lora_faults(self.lora_parameters, self.lora))

    @property
    def pairs_per_update(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.grad_accumulation_steps

    def whole_updates(self, iterations: int) -> int:
        """So many iterations, or the next number that makes whole updates."""
        return -(-iterations // self.grad_accumulation_steps) * self.grad_accumulation_steps

    def crossed(self, every: int, iteration: int) -> bool:
        """Whether a multiple of `every` lies within the update that ends with this iteration."""
        return iteration // every > (iteration - self.grad_accumulation_steps) // every

    def iterations(self, n_pairs: int) -> int:
        """Number of iterations for a training set of n_pairs: whole updates."""
        if self.epochs is not None:
            updates = math.ceil(n_pairs / self.pairs_per_update)
            wanted = math.ceil(round(self.epochs * updates, 6))  # 1.1 * 100 is above 110 in floats
            return max(1, wanted) * self.grad_accumulation_steps
        return self.whole_updates(1000 if self.iters is None else self.iters)

    def validated(self, n_pairs: int) -> int:
        """How many of n_pairs a validation looks at: the first ones."""
        return n_pairs if self.val_batches < 0 else min(n_pairs, self.val_batches * self.batch_size)

    @property
    def lora(self) -> dict[str, Any]:
        return {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None, **self.lora_parameters}


def _lora_faults(given: Mapping[str, Any], lora: Mapping[str, Any]) -> list[str]:
    """Names that are none of lora_parameters, or the values that these cannot have, in one line."""
    if unknown := sorted({*map(str, given)} - {"rank", "scale", "dropout", "keys"}):
        hint = " mlx-lm uses scale, = alpha / rank." if "alpha" in unknown else ""
        return [
            f"lora_parameters: unknown {', '.join(unknown)}; wanted rank, scale, dropout, keys."
            f"{hint}"
        ]
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
    return [f"lora_parameters: {'; '.join(faults)}."] if faults else []
