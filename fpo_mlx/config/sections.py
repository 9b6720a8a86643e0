"""Every setting of a run, its default and its check, once. YAML and the command line fill these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fpo_mlx.config.fields import out_of_bounds, refuse, setting
from fpo_mlx.config.objective import Objective
from fpo_mlx.config.training import TrainConfig


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they become tokens."""

    data: str = setting(
        "",
        "folder of train/valid/test files, one data file (.jsonl, .json, .csv, .parquet), or a "
        "hub dataset id",
        "data",
        first=True,
        path=True,
        by_content=True,
    )
    max_seq_length: int = setting(
        2048, "longest prompt + response, in tokens", "data", first=True, least=2
    )
    train_split: str | None = setting(
        None, "split of a hub dataset to train on, or a slice of one: train[:1000]", "data"
    )
    valid_split: str | None = setting(
        None,
        "split of a hub dataset to validate on",
        "data",
        may_change=True,
        instead_of="valid_share",
    )
    test_split: str | None = setting(
        None, "split of a hub dataset to test on", "data", may_change=True
    )
    valid_share: float = setting(
        0.0,
        "share of the training prompts to validate on, where the data have no validation split",
        "data",
        instead_of="valid_split",
        least=0,
        most=0.5,
    )
    prompt_feature: str = setting("prompt", "name of the prompt column", "data")
    chosen_feature: str = setting("chosen", "name of the chosen column", "data")
    rejected_feature: str = setting("rejected", "name of the rejected column", "data")
    system_feature: str = setting("system", "name of the system column", "data")
    agreement_feature: str = setting(
        "agreement", "column of how sure a label is, 0 to 1: a soft label", "data"
    )
    weight_feature: str = setting("weight", "column of the weight of a pair's loss", "data")
    score_chosen_feature: str = setting(
        "score_chosen", "column of the chosen response's score, for --score-margin", "data"
    )
    score_rejected_feature: str = setting(
        "score_rejected", "column of the rejected response's score, for --score-margin", "data"
    )
    chat_template: str | None = setting(
        None,
        "file with a chat template, in place of the model's",
        "data",
        path=True,
        by_content=True,
    )
    chat_template_args: dict = setting(
        {},
        'variables of the chat template, as JSON: {"enable_thinking": false}',
        "data",
        first=True,
    )
    subset: str | None = setting(None, "configuration of a hub dataset that has several", "data")

    def __post_init__(self) -> None:
        faults = out_of_bounds(self)
        if self.valid_share and self.valid_split:
            faults.append("--valid-share and --valid-split exclude each other; give one.")
        refuse(faults)


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen side: base model, its adapter, and the SAEs that look into it."""

    model: str = setting(
        "",
        "model folder or hub id, owner/name[@revision]",
        "model and SAE",
        first=True,
        path=True,
        by_content=True,
    )
    sae: tuple[str, ...] = setting(
        (),
        "SAE: folder, hub id/path, or short name; repeatable",
        "model and SAE",
        first=True,
        path=True,
        by_content=True,
    )
    layer: int | None = setting(
        None, "block that the SAE reads (default: from the SAE's metadata)", "model and SAE"
    )
    site: str | None = setting(
        None, "site within the block (default: from the SAE's metadata)", "model and SAE"
    )
    sae_format: str | None = setting(
        None, "family of the SAE's files (default: recognised)", "model and SAE", sae_files=True
    )
    sae_k: int | None = setting(
        None,
        "k of a top-k SAE whose files do not hold it",
        "model and SAE",
        sae_files=True,
        above=0,
    )
    norm_scaling_factor: float | None = setting(
        None,
        "factor on the SAE's inputs, where it was trained with one that its files do not hold",
        "model and SAE",
        sae_files=True,
        above=0,
    )
    llama_scope_gate: Literal["authors", "saelens"] = setting(
        "authors",
        "Llama Scope's gate: with the decoder's norm, or without it as in SAELens",
        "model and SAE",
        sae_files=True,
    )
    allow_pickle: bool = setting(
        False,
        "read pickled SAE files through a tensors-only loader",
        "safety",
        sae_files=True,
        may_change=True,
    )
    check_sae: bool = setting(
        True,
        "look at 32 answers before a reference pass; warn of a bad SAE",
        "safety",
        may_change=True,
    )
    trust_remote_code: bool = setting(
        False, "let the model folder run its own Python code", "safety", may_change=True
    )
    dtype: str | None = setting(
        None,
        "float32, bfloat16 or float16, of the torch backend (default: by the device)",
        "memory",
        may_change=True,
    )
    tokens_per_batch: int | None = setting(
        None,
        "tokens in a batch of the torch backend, padding included (default: by the device)",
        "memory",
        may_change=True,
        above=0,
    )
    share_prompt: bool = setting(True, "run the prompt of a pair once for both responses", "memory")
    wired_share: float = setting(
        0.75,
        "part of Metal's working set that train and precompute keep wired; 0 for none",
        "memory",
        may_change=True,
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        refuse(out_of_bounds(self))


_HEAT = "temperature of the answers; 0 takes the likeliest token"
_LONGEST = "longest answer, in tokens"


@dataclass(frozen=True)
class Sampling:
    """Answers drawn from a model; names and meanings are mlx_lm.generate's."""

    max_tokens: int = setting(64, _LONGEST, "answers", above=0)
    temp: float = setting(1.0, _HEAT, "answers", least=0, below=math.inf)
    seed: int = setting(0, "seed of the answers, the same for every model", "answers", least=0)

    def __post_init__(self) -> None:
        refuse(out_of_bounds(self))


@dataclass(frozen=True)
class ChatSampling(Sampling):
    """The same of answers that are read, not measured: they may come to their end."""

    max_tokens: int = setting(512, _LONGEST, "answers", above=0)


@dataclass(frozen=True)
class CompareSampling(ChatSampling):
    """The same of models side by side: where they differ it is the models, and not the draw."""

    temp: float = setting(0.0, _HEAT, "answers", least=0, below=math.inf)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a command, by section.

    asked: those of the objective that flags or YAML gave, "objective" for its preset; flagged: all
    that flags gave.
    """

    data: DataConfig
    reference: ReferenceConfig
    train: TrainConfig
    objective: Objective
    preset: str = "fpo"
    asked: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    flagged: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Flat, as YAML would hold it."""
        flat: dict[str, Any] = {"objective": self.preset}
        for section in (self.data, self.reference, self.train, self.objective):
            flat.update(dataclasses.asdict(section))
        return flat

    def reads(self, *but: str) -> tuple[str, ...]:
        """All that these settings name to be read: places on disk, hub ids, short names.

        but: settings that the command at hand writes to.
        """
        flat, places = self.as_dict(), sorted(set(named("path")) - {"adapter_path", "sae", *but})
        return (*(flat[name] for name in places if flat[name]), *self.reference.sae)


SECTIONS = (DataConfig, ReferenceConfig, TrainConfig, Objective)


def options(sections: Sequence[type] = SECTIONS) -> dict[str, dataclasses.Field]:
    """Every setting by name, over all sections of a run."""
    return {f.name: f for section in sections for f in dataclasses.fields(section)}


def default_of(field: dataclasses.Field) -> Any:
    """The default of one of `options`."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def named(fact: str, sections: Sequence[type] = SECTIONS) -> tuple[str, ...]:
    """Names of the settings of which a fact of `fields.setting` holds, such as "may_change"."""
    return tuple(name for name, field in options(sections).items() if field.metadata[fact])
