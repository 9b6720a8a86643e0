"""Files of JSON lines that only grow: each line is whole or not there, one writer at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fpo_mlx.errors import DataError, FpoError
from fpo_mlx.storage import locks
from fpo_mlx.storage.files import flush, flush_in_order, parse_json, unwritable


class LineWriter:
    """Appends records; what a killed writer left of a last line is cut off first.

    Raises: FpoError when the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(f".{path.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locks.acquire(self._lock_path, path)
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    os.lseek(self._file, _mend(self._file, path), os.SEEK_SET)
                except BaseException:
                    os.close(self._file)
                    raise
            except BaseException:
                locks.release(self._lock_path, self._lock)
                raise
        except OSError as error:
            raise unwritable(path, error) or error from error

    def append(self, *records: Any) -> None:
        """Safe from a kill when this returns, on macOS from a power cut when the file is closed.

        Raises: FpoError; then none of these lines is there.
        """
        if not records:
            return  # the disk is not waited for
        data = b"".join(map(json_line, records))
        begin = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
            flush_in_order(self._file)
        except OSError as error:
            os.ftruncate(self._file, begin)
            os.lseek(self._file, begin, os.SEEK_SET)
            raise unwritable(self.path, error) or error from error

    def close(self) -> None:
        """Raises: FpoError where a Mac's drive did not take what was appended."""
        try:
            if sys.platform == "darwin":  # elsewhere every line was waited for
                flush(self._file)
        except OSError as error:
            raise FpoError(
                f"{self.path}: the drive did not take its last lines: {error.strerror or error}. "
                "Look at the drive, and run the command again."
            ) from error
        finally:
            os.close(self._file)
            locks.release(self._lock_path, self._lock)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with suppress(FpoError) if error is not None else nullcontext():  # that one is told
            self.close()


def json_line(record: Any) -> bytes:
    """One line; half surrogate pairs, which UTF-8 cannot hold, are written as escapes."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, offset, line) of every line that is not blank, one in memory at a time.

    A last line without its end was cut by a kill and is not given. Raises: FpoError.
    """
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                # a file of the user's own may end without a newline
                if line.strip() and (line.endswith(b"\n") or _is_json(line)):
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise FpoError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_record(path: Path, offset: int) -> Any:
    """The record of the line that begins at `offset`."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return parse_json(file.readline())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: changed while it was read: {error}.") from error


def decode(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line. Raises: DataError naming the place."""
    try:
        value = parse_json(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are of its kind
        raise DataError(f"{where}: not JSON in UTF-8: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted an object, found {type(value).__name__}.")
    return value


def tail(file: int, size: int) -> bytes:
    """What follows the last end of a line among the first `size` bytes of an open file."""
    start, pieces = size, [b""]  # the last one first
    while start > 0 and b"\n" not in pieces[-1]:
        step = min(1 << 16, start)
        start -= step
        pieces.append(os.pread(file, step, start))
    return b"".join([pieces[-1].rsplit(b"\n", 1)[-1], *pieces[-2::-1]])


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _mend(file: int, path: Path) -> int:
    """Cut the part of a line at the end, or end it where it is whole; where to write next."""
    size = os.fstat(file).st_size
    rest = tail(file, size)
    if not rest:
        return size
    if _is_json(rest):
        os.pwrite(file, b"\n", size)
        return size + 1
    # a crashed disk leaves zeros; with anything else, no writer of ours began it
    if rest.strip(b"\0") and not rest.lstrip().startswith(b"{"):
        raise FpoError(
            f"{path}: its last line is no record: {rest[:40]!r}. Name another file, or end that "
            "line."
        )
    os.ftruncate(file, size - len(rest))
    return size - len(rest)
