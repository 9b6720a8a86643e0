"""Look at the data before a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from fpo_mlx import __version__, data
from fpo_mlx.config import RunConfig
from fpo_mlx.data import token_store
from fpo_mlx.data.prepare import KEPT_FROM, keeping
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import FpoError
from fpo_mlx.pipeline.job import Say, columns, hub_splits, need_data, open_tokenizer
from fpo_mlx.pipeline.prepared import Ticker, longest, token_folder
from fpo_mlx.storage import files, outputs, paths
from fpo_mlx.storage.hub import resolve_model

REPORTS_KEPT = 20  # of older checks
CLEAN = outputs.Made("a set of checked rows", r"(train|valid|test)\.jsonl", whole=True)


def check(
    config: RunConfig,
    *,
    fix: Path | None,
    overwrite: bool = False,
    say: Say,
    of_rows_alone: bool = False,
) -> data.CheckReport:
    """Check every row of every split; `fix` names a folder for the rows that are good.

    Without a model the checks of the template and of lengths in tokens are left out, which is said
    unless they were not asked for (of_rows_alone). The report of
    a large set is kept by content, and read when the same is asked again; so are its tokens, which
    `train` and `precompute` read.
    Raises: ConfigError without data, or when `fix` would lose something (`storage.outputs`).
    """
    d, ref = config.data, config.reference
    need_data(config)
    claim = partial(
        outputs.claim_folder, flag="--fix", made=CLEAN, inputs=config.reads(), overwrite=overwrite
    )
    fix = None if fix is None else claim(fix)
    tokenizer = None
    if ref.model:
        tokenizer = open_tokenizer(config, resolve_model(ref.model, weights=False), say)
    elif not of_rows_alone:
        say("no --model: chat template and lengths in tokens are not checked")
    hub = hub_splits(config)
    names = list(data.find_splits(d.data, hub)) or ["train"]
    limit = longest(d.max_seq_length, tokenizer, say) if tokenizer else None
    kept = None if fix is not None else _place(config, names, tokenizer, limit)
    if kept is not None and (before := _read(kept)) is not None:
        return before
    with ExitStack() as stack:
        takes = {} if tokenizer is None else {
            name: stack.enter_context(
                keeping(d.data, name, tokenizer, columns(config), hub, store=token_folder())
            )
            for name in names
        }  # fmt: skip
        report = data.check_data(
            {name: data.iterate_raw(d.data, name, hub, columns(config)) for name in names},
            tokenizer,
            limit,
            columns(config),
            Ticker(say, "checked"),
            keep_clean=fix is not None,
            each=lambda name, item: takes[name](item) if takes else None,
        )
    if fix is not None:
        with files.atomic_folder(fix, partial(claim, fix)) as work:
            written = data.write_clean(report.clean, work)
        for path in written:
            say(f"wrote {fix / path.name}")
    if kept is not None and sum(split.rows for split in report.splits.values()) >= KEPT_FROM:
        _keep(kept, report)
    return report


def _place(
    config: RunConfig, names: Sequence[str], tokenizer: ChatTokenizer | None, limit: int | None
) -> Path:
    """The file of a report, named by all that decides it."""
    hub = hub_splits(config)
    parts = [
        token_store.FORMAT, __version__,
        [[name, data.content_key(config.data.data, name, hub)] for name in names],
        tokenizer and tokenizer.encoding_key(), limit, vars(columns(config)),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return paths.cache_root() / "checks" / f"{key}.json"


def _read(path: Path) -> data.CheckReport | None:
    try:
        return data.CheckReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or spoiled: made again


def _keep(path: Path, report: data.CheckReport) -> None:
    with suppress(OSError, FpoError):  # no room, no rights: go on without
        files.write_json(path, report.as_dict())
        older = sorted(
            files.listed(path.parent, "*.json"), key=lambda p: p.stat().st_mtime, reverse=True
        )
        for one in older[REPORTS_KEPT:]:
            one.unlink(missing_ok=True)
