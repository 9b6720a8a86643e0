"""One local file of rows, whatever it is: JSON lines, a JSON array, CSV, Parquet, Arrow; packed by
gzip, bzip2, xz or zstd; UTF-8 or UTF-16. What a file is, its first bytes say before its name does.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fpo_mlx.data.tables import records
from fpo_mlx.errors import DataError, FpoError

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")
_PACKED = ("gz", "bz2", "xz", "zst")
_NAME = re.compile(rf"(.+?)\.({'|'.join(FORMATS)})(?:\.({'|'.join(_PACKED)}))?", re.IGNORECASE)
_UNPACK: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(_zstd(path)),
}
_REFUSED = {
    b"PK\x03\x04": "a zip archive (or an Excel file): unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file: save the sheet as CSV",
    b"SQLite format": "an SQLite database: export the table as JSON lines or CSV",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"version https://git-lfs": "Git LFS's pointer to a file that is not here: run `git lfs pull`",
}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_WRAPPERS = ("data", "rows", "examples", "instances", "train")  # {"data": [row, …]}
_PEEK = 64


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, before anything is made of it."""

    record: Any  # None if it could not be read
    where: str  # "train.jsonl:12", "owner/name[train_prefs]:12"; counted from 1
    index: int  # within its split, from 0
    fault: str = ""  # why it could not be read


def stem(path: Path) -> str | None:
    """The name of a data file without what it says of its format; None for any other file."""
    match = _NAME.fullmatch(path.name)
    return match.group(1) if match and not path.name.startswith(".") else None


def file_rows(path: Path) -> Iterator[RawRow]:
    """The rows of one file, one by one. A line that cannot be read becomes a fault.

    Raises DataError (a file that is none of the known ones) and FpoError (no such file).
    """
    with _opened(path) as (head, stream, packed):
        parquet = head.startswith(b"PAR1")
        if not parquet and not head.startswith(b"ARROW1") and _form(path) != "arrow":
            yield from _text_rows(path, head, stream)
            return
        found = records(path, head + stream.read() if packed else None, parquet=parquet)
        for index, record in enumerate(found):
            yield RawRow(record, f"{path.name}:{index + 1}", index)


def _form(path: Path) -> str:
    """What a file's name says of its format; "" where it says nothing."""
    match = _NAME.fullmatch(path.name)
    return match.group(2).lower() if match else ""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[bytes, IO[bytes], bool]]:
    """What a file holds, unpacked: its first bytes, the others, and whether it was packed.

    Raises: as `file_rows`.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(_PEEK)
        unpack = next((u for mark, u in _UNPACK.items() if magic.startswith(mark)), None)
        with unpack(path) if unpack else path.open("rb") as stream:
            head = stream.read(_PEEK)
            for mark, what in _REFUSED.items():
                if head.startswith(mark):
                    raise DataError(f"{path} is {what}. Wanted JSON lines, JSON, CSV or Parquet.")
            yield head, stream, unpack is not None
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: the packed file is damaged: {error}. Copy it again.") from error
    except OSError as error:
        if error.errno is None:  # of an unpacker, not of the system
            what = f"{path}: the packed file is damaged: {error}. Copy it again."
            raise DataError(what) from error
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def text_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line as UTF-8) of a text file that is no table, packed or not.

    Raises: as `file_rows`.
    """
    with _opened(path) as (head, stream, _):
        yield from enumerate(_utf8(path, head, stream), start=1)


def digest(path: Path) -> str:
    """sha256 over a file's bytes. Raises FpoError."""
    made = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                made.update(chunk)
        return made.hexdigest()
    except OSError as error:
        raise FpoError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


def _text_rows(path: Path, head: bytes, stream: IO[bytes]) -> Iterator[RawRow]:
    lines, form = _utf8(path, head, stream), _form(path)
    if form in ("csv", "tsv"):
        yield from _csv_rows(path, lines, tabs=form == "tsv")
    else:
        yield from _json_rows(path, lines)


def _utf8(path: Path, head: bytes, stream: IO[bytes]) -> _Lines:
    """The lines of a text file, brought to UTF-8."""
    encoding = _encoding(head)
    if encoding == "utf-8":
        return _Lines(head.removeprefix(codecs.BOM_UTF8), stream)
    try:
        text = (head + stream.read()).decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} begins as {encoding}, but is not: {error}.") from error
    return _Lines(b"", io.BytesIO(text.encode("utf-8", "surrogatepass")))


def _encoding(head: bytes) -> str:
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            return encoding
    if len(head) >= 4 and head[1:4:2] == b"\0\0" and head[0] and head[2]:
        return "utf-16-le"  # PowerShell's, without its mark
    if len(head) >= 4 and head[0:4:2] == b"\0\0" and head[1] and head[3]:
        return "utf-16-be"
    return "utf-8"


class _Lines:
    """Lines of bytes, without their ends, from what was read ahead and what is left.

    head: a few bytes, for each line in it copies what is behind.
    """

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head, self._stream = head, stream

    def __iter__(self) -> Iterator[bytes]:
        at = self._head.find(b"\n")
        while at >= 0:
            line, self._head = self._head[:at], self._head[at + 1 :]
            yield line
            at = self._head.find(b"\n")
        first, self._head = self._head, b""
        for more in self._stream:
            yield (first + more).removesuffix(b"\n")
            first = b""
        if first:
            yield first

    def rest(self) -> bytes:
        head, self._head = self._head, b""
        return head + self._stream.read()


def _json_rows(path: Path, lines: _Lines) -> Iterator[RawRow]:
    """One object per line; where the first line is no object, an array or objects over lines."""
    begun, numbered = b"", 0
    for line in lines:
        numbered += 1
        if line.strip():
            begun = line
            break
    record, fault = decode(begun) if begun else (None, "")
    if isinstance(record, Mapping) and _wrapped(record) is None:
        yield RawRow(record, f"{path.name}:{numbered}", 0)
        yield from _lines_from(path, lines, numbered + 1, 1)
        return
    content = begun + b"\n" + lines.rest()
    found = _documents(path, content)
    if found is not None:
        for index, one in enumerate(found):
            yield RawRow(one, f"{path.name}[{index + 1}]", index)
        return
    yield from _lines_from(path, _Lines(b"", io.BytesIO(content)), numbered, 0)


def _lines_from(path: Path, lines: Any, number: int, index: int) -> Iterator[RawRow]:
    for at, line in enumerate(lines, start=number):
        if line.strip():
            record, fault = decode(line)
            yield RawRow(record, f"{path.name}:{at}", index, fault)
            index += 1


def _documents(path: Path, content: bytes) -> list[Any] | None:
    """The rows of one array, of an object around one, or of objects one after the other.

    None for anything else. Raises DataError for an array or object over several lines that breaks.
    """
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        if _over_lines(content.decode("latin-1").strip()):
            raise DataError(
                f"{path} is not UTF-8 (line {content[: error.start].count(10) + 1}): save it as "
                "UTF-8."
            ) from error
        return None
    if text[:1] not in ("[", "{"):
        return None
    found, at = [], 0
    try:
        while at < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            found.append(value)
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
    except json.JSONDecodeError as error:
        if _over_lines(text):
            raise DataError(
                f"{path}: a JSON array, or objects over several lines, that breaks at line "
                f"{error.lineno}, column {error.colno}: {error.msg}. Mend it there, or write one "
                "object per line (JSON lines)."
            ) from error
        return None
    except (ValueError, RecursionError):
        return None
    if len(found) == 1:
        rows = found[0] if isinstance(found[0], list) else _wrapped(found[0])
        if rows is not None:
            return rows if any(isinstance(row, Mapping) for row in rows) else None
    return found if all(isinstance(value, Mapping) for value in found) else None


def _over_lines(text: str) -> bool:
    """Whether a text begins as an array of rows, or as an object over several lines."""
    return re.match(r"\[\s*[\[{\n]|\{\s*\n", text) is not None


def _wrapped(value: Any) -> list[Any] | None:
    """The rows of {"data": [row, …]}, or None."""
    if not isinstance(value, Mapping):
        return None
    held = [value[name] for name in _WRAPPERS if isinstance(value.get(name), list)]
    if len(held) == 1 and held[0] and all(isinstance(row, Mapping) for row in held[0]):
        return held[0] if len([v for v in value.values() if isinstance(v, list)]) == 1 else None
    return None


def decode(line: bytes) -> tuple[Any, str]:
    """The value of one line of JSON, or why there is none."""
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start + 1} of the line)"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at character {error.pos + 1}"
    except ValueError:
        return None, "not JSON: a number with too many digits"
    except RecursionError:
        return None, "not JSON: nested too deeply"


def _csv_rows(path: Path, lines: _Lines, *, tabs: bool) -> Iterator[RawRow]:
    """One row per record; a field may hold line ends within quotes."""
    csv.field_size_limit(1 << 30)
    try:
        text = lines.rest().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start + 1}): save it as UTF-8 CSV."
        ) from error
    told = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    mark = told.group(1) if told else "\t" if tabs else _mark(text)
    text, skipped = (text[told.end() :], 1) if told else (text, 0)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    names: list[str] | None = None
    index, begin = 0, 1 + skipped
    try:
        for fields in reader:
            where, begin = f"{path.name}:{begin}", reader.line_num + 1 + skipped
            if not any(field.strip() for field in fields):
                continue
            if names is None:
                names = _column_names(path, fields)
                continue
            if len(fields) == len(names):
                yield RawRow(dict(zip(names, fields, strict=True)), where, index)
            else:
                what = f"{len(fields)} fields, but the first line names {len(names)} columns"
                yield RawRow(None, where, index, what)
            index += 1
    except csv.Error as error:
        last = reader.line_num + skipped
        place = f"at line {begin}" if begin == last else f"from line {begin} to line {last}"
        raise DataError(f"{path}: no CSV {place}: {error}.") from error


def _mark(text: str) -> str:
    """What parts the columns: the mark that gives the first line the most of them."""

    def columns(mark: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)))
        except (csv.Error, StopIteration):
            return 0

    return max(",;\t", key=columns)


def _column_names(path: Path, fields: list[str]) -> list[str]:
    """Raises DataError for a name that stands twice: which of the two is meant?"""
    names = [field.strip() for field in fields]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice!r}. Rename or drop one of them.")
    return names
