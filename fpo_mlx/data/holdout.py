"""The splits as a run sees them: those of `read`, or with --valid-share a part of the training rows
in the place of a validation split that is not there.

The part is chosen by prompt, so that none stands on both sides, and a prompt's own hash says on
which it is: every command holds the same rows back, also when others have been added, and a larger
share holds back those of a smaller one and more. Two prompts may change sides when others come: the
lowest hash, held back where none is below the share, and the highest, kept where all are. A prompt
is what `check` calls the same in two splits: without its system message, letter case and spacing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fpo_mlx.data import read
from fpo_mlx.data.containers import RawRow
from fpo_mlx.data.findings import topic_of
from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.read import AUTO_SPLITS, HubSplits, Place, Unclear
from fpo_mlx.data.rows import DEFAULT_COLUMNS, Columns, PreferenceRow
from fpo_mlx.errors import ConfigError, DataError, FpoError

SEED = 0  # no setting: a run's own seed would hold other rows back than `evaluate` judges


def find_splits(
    source: str | Path, hub: HubSplits = AUTO_SPLITS, want: str = "train"
) -> Mapping[str, Place | Unclear]:
    """`read.find_splits`; with a share one file is the training split, whatever is asked for.

    Raises: also ConfigError for a share where there is a validation split.
    """
    if not hub.valid_share:
        return read.find_splits(source, hub, want)
    found = read.find_splits(source, hub, "train")
    own = found.get("valid")
    if own is not None and not (hub.test and own == found.get("test")):
        raise ConfigError(
            f"--valid-share {hub.valid_share:g}: {source} has a validation split of its own, so "
            "nothing is held back from its training rows. Leave the share out (--valid-share 0 "
            "over a YAML file's), or, where that split is test_prefs, name it as --test-split."
        )
    return {**found, "valid": found["train"]} if "train" in found else found


def find_place(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> Place:
    """Where the rows of a split lie, those of others perhaps among them. Raises as `read`'s."""
    if not _is_part(source, split, hub):
        return read.find_place(source, split, hub)
    return read.find_place(source, "train", replace(hub, valid_share=0.0))


def iterate_raw(
    source: str | Path,
    split: str,
    hub: HubSplits = AUTO_SPLITS,
    columns: Columns = DEFAULT_COLUMNS,
) -> Iterator[RawRow]:
    """`read.iterate_raw` of a split as the run sees it. columns: where a share finds the prompts.

    Raises: as that and `find_splits`; DataError where a share leaves nothing to validate on.
    """
    if not _is_part(source, split, hub):
        yield from read.iterate_raw(source, split, hub)
        return
    whole = replace(hub, valid_share=0.0)
    key = read.content_key(source, "train", whole)
    held = _held(key, str(source), whole, columns, hub.valid_share)
    if split == "valid" and not held:
        raise DataError(
            f"--valid-share {hub.valid_share:g}: {source} has no two different prompts among the "
            "rows that can be read, so none can be held back. Leave the share out."
        )
    index = 0
    for row in read.iterate_raw(source, "train", whole):
        if (row.index in held) == (split == "valid"):
            yield replace(row, index=index)
            index += 1


def read_split(
    source: str | Path,
    split: str = "train",
    columns: Columns = DEFAULT_COLUMNS,
    hub: HubSplits = AUTO_SPLITS,
) -> list[PreferenceRow]:
    """Read all rows of one split ("train", "valid" or "test").

    source: a folder with a data file for each split; one data file, which is then the split that
    was asked for; or the id of a data set on the hub. `containers` says what a data file is.

    Raises DataError (no rows, or rows that cannot be used: all of them are named) and FpoError
    (no such file, folder, data set or split).
    """
    raw = iterate_raw(source, split, hub, columns)
    return read.parse_rows(raw, f"{source} ({split})", columns)


def content_key(source: str | Path, split: str, hub: HubSplits = AUTO_SPLITS) -> str:
    """`read.content_key`; of a part of the training rows that of these rows and the share.

    Which column holds the prompt is not in it. Raises as `find_splits`.
    """
    if not _is_part(source, split, hub):
        return read.content_key(source, split, hub)
    whole = read.content_key(source, "train", replace(hub, valid_share=0.0))
    parts = [whole, "valid_share by hash", hub.valid_share, split]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_part(source: str | Path, split: str, hub: HubSplits) -> bool:
    """Whether the split is a part of the training rows. Raises FpoError for a test that is not."""
    if not hub.valid_share:
        return False
    found = find_splits(source, hub, split)
    if split == "test" and "test" not in found:
        raise FpoError(
            f"{source}: no test split, and with --valid-share {hub.valid_share:g} its rows are for "
            "training and validation. --split valid looks at those that are held back."
        )
    return split != "test"


@lru_cache(maxsize=4)
def _held(
    key: str, source: str, hub: HubSplits, columns: Columns, share: float
) -> frozenset[int]:  # fmt: skip
    """Rows of the training split, by index, whose prompts are held back. key: of their content.

    A row that cannot be read is refused by whoever reads it, and stays in training till then.
    """
    topics: dict[int, str] = {}
    for raw in read.iterate_raw(source, "train", hub):
        try:
            topics[raw.index] = topic_of(read.parse_raw(raw, columns)).hex()
        except RowFault:
            continue
    held = held_back(topics.values(), share)
    return frozenset(index for index, topic in topics.items() if topic in held)


def held_back(prompts: Iterable[str], share: float) -> set[str]:
    """Those whose hash is below the share of all hashes; one at least where two are, never all."""
    places = {prompt: _place(prompt) for prompt in dict.fromkeys(prompts)}
    if len(places) < 2:
        return set()
    below = {prompt for prompt, place in places.items() if place < share}
    return (below or {min(places, key=places.__getitem__)}) - {max(places, key=places.__getitem__)}


def _place(prompt: str) -> float:
    """From 0 to 1, evenly."""
    digest = hashlib.sha256(f"{SEED}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
