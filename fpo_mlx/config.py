"""Every setting, its default and its check, once. YAML and the command line only fill these.

Command line beats YAML beats preset beats default. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fpo_mlx.errors import ConfigError


def _opt(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Objective:
    """One point of the family of `core.objectives`; see the README's table of presets."""

    beta: float = _opt(0.1, "strength of the preference term")
    alpha: float = _opt(0.5, "strength of the constraint, relative to beta")
    gamma: float = _opt(0.0, "constant margin: u = beta * difference - gamma")
    length_normalize: bool = _opt(True, "divide log-probs by the response's length")
    margin: Literal["reference", "constant"] = _opt("reference", "margin of the objective")
    constraint: Literal["none", "features", "activations", "kl"] = _opt(
        "features", "what is held near the reference"
    )
    stop_gradient: bool = _opt(True, "no gradient through the chosen response's constraint")
    top_k: int = _opt(50, "features of each side that the distance looks at")
    feature_scale: Literal["raw", "reference"] = _opt(
        "raw", "raw: the paper's D; reference: D over the mean square of the reference's top-k"
    )
    feature_weights: str | None = _opt(
        None, "file of feature: weight; these are held so much on both responses; 0 frees a feature"
    )

    def __post_init__(self) -> None:
        _positive(self, "beta", "top_k")
        _finite(self, "beta", "alpha", "gamma")
        if self.alpha < 0:
            raise ConfigError(f"--alpha {self.alpha}: wanted 0 or more.")

    @property
    def needs_sae(self) -> bool:
        return self.constraint == "features"

    @property
    def pooled(self) -> bool:
        """Whether the constraint compares pooled vectors of a tapped site."""
        return self.constraint in ("features", "activations")


PRESETS: dict[str, dict[str, Any]] = {
    "fpo": {},
    "dpo": {"length_normalize": False, "constraint": "none"},
    "simpo": {"margin": "constant", "constraint": "none", "beta": 2.0, "gamma": 1.0},
    "simpo-kl": {"margin": "constant", "constraint": "kl", "beta": 2.0, "gamma": 1.0},
    "tdpo1": {"length_normalize": False, "constraint": "kl", "alpha": 1.0, "stop_gradient": False},
    "tdpo2": {"length_normalize": False, "constraint": "kl"},
}


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they become tokens."""

    data: str = _opt("", "folder of train/valid/test.jsonl, one .jsonl file, or a hub dataset id")
    max_seq_length: int = _opt(2048, "longest prompt + response, in tokens")
    train_split: str | None = _opt(None, "split of a hub dataset to train on")
    valid_split: str | None = _opt(None, "split of a hub dataset to validate on")
    test_split: str | None = _opt(None, "split of a hub dataset to test on")
    prompt_feature: str = _opt("prompt", "name of the prompt column")
    chosen_feature: str = _opt("chosen", "name of the chosen column")
    rejected_feature: str = _opt("rejected", "name of the rejected column")
    system_feature: str = _opt("system", "name of the system column")
    chat_template: str | None = _opt(None, "file with a chat template, in place of the model's")

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise ConfigError(f"--max-seq-length {self.max_seq_length}: wanted 2 or more.")


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen side: base model, its adapter, and the SAEs that look into it."""

    model: str = _opt("", "model folder or hub id, owner/name[@revision]")
    sae: tuple[str, ...] = _opt((), "SAE: folder, hub id/path, or short name; repeatable")
    layer: int | None = _opt(None, "block that the SAE reads (default: from the SAE's metadata)")
    site: str | None = _opt(None, "site within the block (default: from the SAE's metadata)")
    sae_format: str | None = _opt(None, "family of the SAE's files (default: recognised)")
    sae_k: int | None = _opt(None, "k of a top-k SAE whose files do not hold it")
    norm_scaling_factor: float | None = _opt(
        None, "factor on the SAE's inputs, where it was trained with one that its files do not hold"
    )
    llama_scope_gate: Literal["authors", "saelens"] = _opt(
        "authors", "Llama Scope's gate: with the decoder's norm, or without it as in SAELens"
    )
    allow_pickle: bool = _opt(False, "read pickled SAE files through a tensors-only loader")
    check_sae: bool = _opt(True, "look at 32 answers before a reference pass; warn of a bad SAE")
    trust_remote_code: bool = _opt(False, "let the model folder run its own Python code")
    dtype: str | None = _opt(
        None, "float32, bfloat16 or float16, of the torch backend (default: by the device)"
    )
    tokens_per_batch: int | None = _opt(
        None, "tokens in a batch of the torch backend, padding included (default: by the device)"
    )
    share_prompt: bool = _opt(True, "run the prompt of a pair once for both responses")

    def __post_init__(self) -> None:
        asked = ("sae_k", "norm_scaling_factor", "tokens_per_batch")
        _positive(self, *(name for name in asked if getattr(self, name) is not None))


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. Names and defaults are mlx_lm.lora's wherever it has them."""

    adapter_path: str = _opt("adapters", "folder to write adapters and metrics to")
    init_adapter: str | None = _opt(None, "adapter that is the reference and the policy's start")
    reference: str | None = _opt(None, "reference cache (default: one under the user cache)")
    iters: int | None = _opt(None, "iterations of batch-size pairs (default 1000)")
    epochs: float | None = _opt(None, "passes over the data, in place of --iters")
    batch_size: int = _opt(4, "pairs per iteration")
    grad_accumulation_steps: int = _opt(1, "iterations per optimizer update")
    micro_batch_size: int = _opt(1, "pairs in memory at once; changes memory and time only")
    learning_rate: float = _opt(1e-5, "learning rate")
    lr_schedule: dict | None = _opt(None, "mlx-lm's block: {name, arguments, warmup, warmup_init}")
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = _opt("adam", "optimizer")
    optimizer_config: dict = _opt({}, "arguments of the optimizer, by its name")
    max_grad_norm: float | None = _opt(1.0, "clip the gradient's global norm; 0 for never")
    fine_tune_type: Literal["lora", "dora"] = _opt("lora", "kind of adapter")
    num_layers: int | None = _opt(
        None, "blocks to adapt, counted back from the SAE's (default 16, or all; -1 for all)"
    )
    adapt_above_sae: bool = _opt(False, "count --num-layers back from the last block instead")
    lora_parameters: dict = _opt({}, "rank (8), scale (20.0), dropout (0.0), keys")
    grad_checkpoint: bool = _opt(False, "recompute activations: less memory, more time")
    seed: int = _opt(0, "seed of adapters, dropout and data order")
    steps_per_report: int = _opt(10, "iterations between reports")
    steps_per_eval: int = _opt(200, "iterations between validations")
    val_batches: int = _opt(25, "batches of a validation, -1 for all, 0 for no validation")
    save_every: int = _opt(100, "iterations between numbered checkpoints")
    resume: bool = _opt(False, "continue the run in --adapter-path exactly where it stopped")
    report_to: str | None = _opt(None, "wandb, tensorboard, or both with a comma")
    project_name: str | None = _opt(None, "project name at the tracker")
    early_stopping: int | None = _opt(
        None, "stop after so many validations in a row without a better loss"
    )
    on_divergence: Literal["stop", "skip"] = _opt(
        "stop", "stop: end the run, exit code 4; skip: leave that update out and count it"
    )
    max_skipped_updates: int = _opt(5, "updates left out in a row that end the run all the same")
    max_start_gap: float = _opt(
        0.05, "refuse to start when |u| / beta is above this: policy and reference differ"
    )
    peer_timeout: float = _opt(
        600.0, "seconds to wait for the other processes of a launcher before giving up"
    )
    max_margin: float = _opt(50.0, "largest |u| / beta of an update, in nats a token")
    max_logp_drop: float = _opt(
        5.0, "most that the chosen log-prob may fall below the reference's, in nats a token"
    )
    max_feature_distance: float | None = _opt(
        None, "largest D of an update; its scale is the SAE's, so there is no bound by default"
    )

    def __post_init__(self) -> None:
        _positive(
            self, "batch_size", "grad_accumulation_steps", "micro_batch_size", "learning_rate",
            "steps_per_report", "steps_per_eval", "save_every", "max_margin", "max_logp_drop",
            "early_stopping", "max_skipped_updates", "max_feature_distance",
            "max_start_gap", "peer_timeout",
        )  # fmt: skip
        _finite(self, "learning_rate", "epochs")
        if self.iters is not None and self.epochs is not None:
            raise ConfigError("--iters and --epochs exclude each other; give one.")
        if (self.iters is not None and self.iters < 1) or (
            self.epochs is not None and self.epochs <= 0
        ):
            raise ConfigError("--iters and --epochs: wanted more than 0.")
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

    def iterations(self, n_pairs: int) -> int:
        """Number of iterations for a training set of n_pairs."""
        if self.epochs is not None:
            updates = math.ceil(n_pairs / (self.batch_size * self.grad_accumulation_steps))
            return max(1, math.ceil(self.epochs * updates) * self.grad_accumulation_steps)
        return 1000 if self.iters is None else self.iters

    @property
    def lora(self) -> dict[str, Any]:
        return {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": None, **self.lora_parameters}


@dataclass(frozen=True)
class Sampling:
    """Answers drawn from a model; names and meanings are mlx_lm.generate's."""

    max_tokens: int = _opt(64, "longest answer, in tokens")
    temp: float = _opt(1.0, "temperature of the answers; 0 takes the likeliest token")
    seed: int = _opt(0, "seed of the answers, the same for every model")

    def __post_init__(self) -> None:
        _positive(self, "max_tokens")
        if not 0 <= self.temp < math.inf:
            raise ConfigError(f"--temp {self.temp}: wanted a finite number, 0 or more.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: wanted 0 or more.")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a command, by section."""

    data: DataConfig
    reference: ReferenceConfig
    train: TrainConfig
    objective: Objective
    preset: str = "fpo"

    def as_dict(self) -> dict[str, Any]:
        """Flat, as YAML would hold it."""
        flat: dict[str, Any] = {"objective": self.preset}
        for section in (self.data, self.reference, self.train, self.objective):
            flat.update(dataclasses.asdict(section))
        return flat


SECTIONS = (DataConfig, ReferenceConfig, TrainConfig, Objective)
PATHS = ("reference", "adapter_path", "init_adapter", "chat_template", "feature_weights")
YAML_ONLY = ("lora_parameters", "lr_schedule", "optimizer_config")


def options() -> dict[str, dataclasses.Field]:
    """Every setting by name, over all sections."""
    return {f.name: f for section in SECTIONS for f in dataclasses.fields(section)}


def load_config(flags: Mapping[str, Any], path: Path | None = None) -> RunConfig:
    """Settings from flags that were given (not None) over those of a YAML file over defaults.

    Raises: ConfigError for unknown keys, wrong types and values out of range, all at once.
    """
    given = read_yaml(path) if path else {}
    known = options()
    unknown = sorted(set(given) - set(known) - {"objective"})
    if unknown:
        raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}.{_closest(unknown)}")
    given |= {name: value for name, value in flags.items() if value is not None}
    preset = given.pop("objective", "fpo")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"--objective {preset}: wanted one of {', '.join(PRESETS)}.")
    given = {**PRESETS[preset], **given}
    faults, values = [], {}
    for name, value in given.items():
        try:
            values[name] = coerce(name, value, _hints()[name])
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    for name in PATHS:  # a shell does this for flags, nobody for YAML
        if isinstance(path := values.get(name), str):
            values[name] = os.path.expanduser(path)
    sections = [
        section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for section in SECTIONS
    ]
    return RunConfig(*sections, preset=preset)  # type: ignore[arg-type]


def _hints() -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for section in SECTIONS:
        hints.update(typing.get_type_hints(section))
    return hints


def coerce(name: str, value: Any, hint: Any) -> Any:
    """YAML reads 1e-5 as text and [a] as a list: bring a value to its declared type.

    Raises ConfigError.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return coerce(name, value, next(a for a in arguments if a is not type(None)))
    flag = "--" + name.replace("_", "-")
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(f"{flag} {value}: wanted one of {', '.join(arguments)}.")
        return value
    if origin is tuple:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{flag} {value!r}: wanted a text or a list of texts.")
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):  # infinity is a bound that is never reached
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{flag} {value!r}: wanted {getattr(hint, '__name__', hint)}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The top level of a YAML file. Raises ConfigError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: 1e-5 is one, which PyYAML reads as text."""

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as YAML: nested too deeply") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {type(value).__name__}, wanted `setting: value` lines.")
    return {str(key): v for key, v in value.items()}


def _closest(unknown: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(unknown[0], options(), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _check_lora(lora: Mapping[str, Any]) -> None:
    """Raises: ConfigError for values that lora_parameters cannot have, all at once."""
    rank, scale, dropout, keys = (lora[name] for name in ("rank", "scale", "dropout", "keys"))
    faults = []
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        faults.append(f"rank {rank!r}, wanted a whole number above 0")
    if not _is_number(scale):
        faults.append(f"scale {scale!r}, wanted a number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"dropout {dropout!r}, wanted 0 or more and less than 1")
    texts = isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)
    if keys is not None and not texts:
        faults.append(f"keys {keys!r}, wanted a list of names such as self_attn.q_proj")
    if faults:
        raise ConfigError(f"lora_parameters: {'; '.join(faults)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(config: Any, *names: str) -> None:
    faults = [
        f"--{name.replace('_', '-')} {value}: wanted a finite number."
        for name in names
        if (value := getattr(config, name)) is not None and not math.isfinite(value)
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _positive(config: Any, *names: str) -> None:
    faults = [
        f"--{name.replace('_', '-')} {getattr(config, name)}: wanted more than 0."
        for name in names
        if (value := getattr(config, name)) is not None and not value > 0
    ]
    if faults:
        raise ConfigError("\n".join(faults))
