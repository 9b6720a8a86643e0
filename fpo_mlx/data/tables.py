"""The rows of one Parquet or Arrow table, with what a column keeps as JSON read as its values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fpo_mlx.errors import DataError

_BATCH = 1024
Reads = Callable[[Any], Any]


def records(path: Path, unpacked: bytes | None, *, parquet: bool) -> Iterator[dict[str, Any]]:
    """The rows of a table, one by one.

    unpacked: the table of a packed file, in memory; None for one that is read where it lies.
    Raises: DataError for a table that breaks.
    """
    import pyarrow

    try:
        with _table(path, unpacked) as source:
            for batch in _parquet(source) if parquet else _arrow(source):
                kept = {f.name: reads for f in batch.schema if (reads := _json_of(f.type))}
                for record in batch.to_pylist():
                    yield _with(kept, record) or {}
    except pyarrow.ArrowException as error:
        first = str(error).strip().splitlines()[0][:200]
        raise DataError(f"{path} cannot be read as a table: {first}. Copy it again.") from error


def _json_of(kind: Any) -> Reads | None:
    """What makes values of a column's type with JSON texts within it; None where it has none.

    `datasets` 5 keeps turns of unlike keys as a list of such texts.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return _value
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _json_of(kind.value_type)
        return inner and (lambda held: held and [inner(one) for one in held])
    if types.is_struct(kind):
        parts = {f.name: reads for f in kind if (reads := _json_of(f.type))}
        return partial(_with, parts) if parts else None
    return None


def _with(parts: Mapping[str, Reads], held: dict[str, Any] | None) -> dict[str, Any] | None:
    """An object with some of its values read."""
    return held and {**held, **{name: reads(held[name]) for name, reads in parts.items()}}


def _value(text: str | None) -> Any:
    """Of a text that is no JSON the text itself: the row is judged by what it holds."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _table(path: Path, unpacked: bytes | None) -> Any:
    import pyarrow

    return pyarrow.memory_map(str(path)) if unpacked is None else pyarrow.BufferReader(unpacked)


def _parquet(source: Any) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_BATCH)


def _arrow(source: Any) -> Iterator[Any]:
    import pyarrow

    head = source.read(6)
    source.seek(0)
    if head == b"ARROW1":
        table = pyarrow.ipc.open_file(source)
        for at in range(table.num_record_batches):
            yield table.get_batch(at)
    else:
        yield from pyarrow.ipc.open_stream(source)
