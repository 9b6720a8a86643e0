"""Look at the data before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fpo_mlx import data
from fpo_mlx.config import RunConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.job import Say, columns, hub_splits, open_tokenizer
from fpo_mlx.pipeline.prepared import Ticker, longest
from fpo_mlx.storage import outputs
from fpo_mlx.storage.hub import resolve_model

CLEAN = outputs.Made("a set of checked rows", r"(train|valid|test)\.jsonl")


def check(
    config: RunConfig,
    *,
    fix: Path | None,
    overwrite: bool = False,
    say: Say,
    progress: Callable[[int], None] | None = None,
) -> data.CheckReport:
    """Check every row of every split; `fix` names a folder for the rows that are good.

    Without a model the checks of the template and of lengths in tokens are left out.
    Raises: ConfigError without data, or when `fix` would lose something (`storage.outputs`).
    """
    d, ref = config.data, config.reference
    if not d.data:
        raise ConfigError("--data is missing. Wanted a folder, a .jsonl file or a hub data set id.")
    if fix is not None:
        outputs.claim_folder(fix, "--fix", CLEAN, inputs=config.reads(), overwrite=overwrite)
    tokenizer = None
    if ref.model:
        tokenizer = open_tokenizer(config, resolve_model(ref.model), say)
    else:
        say("no --model: chat template and lengths in tokens are not checked")
    hub = hub_splits(config)
    names = list(data.find_splits(d.data, hub)) or ["train"]
    report = data.check_data(
        {name: data.iterate_raw(d.data, name, hub) for name in names},
        tokenizer,
        longest(d.max_seq_length, tokenizer, say) if tokenizer else None,
        columns(config),
        progress or Ticker(say, "checked"),
        keep_clean=fix is not None,
    )
    for path in data.write_clean(report.clean, fix) if fix is not None else ():
        say(f"wrote {path}")
    return report
