"""Files and folders that are either whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fpo_mlx.errors import FpoError
from fpo_mlx.storage import locks

TEMPORARY = ".tmp-"
ASIDE = ".old"  # behind the process's number, where no target's name can stand
WRITERS = re.escape(TEMPORARY) + rf"\d+({re.escape(ASIDE)})?-"  # before the name of what they write
BARRIER = 85  # F_BARRIERFSYNC of macOS, which Python does not name
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
# what MLX and safetensors say when the system refuses to write: classes that say nothing
_FOREIGN = ("[write] ", "[save_safetensors] Failed to open", "Error while serializing: I/O error")


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds, sorted; without dot files, and without what lies in dot folders.

    Finder leaves .DS_Store, and macOS on other systems' disks an AppleDouble ._NAME beside NAME:
    neither is a file of anyone's. Empty for what is no folder.
    """
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends without error.

    Of a link it is the target that is replaced; a pipe or a device is written to as it is.
    Raises: FpoError when the system does not let it be written; what was there is untouched.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # keeps the suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            flush(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        _raise_plainly(path, error)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` in one step, all or nothing.

    check: called just before that step; what it raises keeps `path` as it is.
    What a killed process left beside `path` is cleared. Raises: FpoError when the system does not
    let it be written, or another process is writing it.
    """
    target = Path(os.path.realpath(path))  # a link's folder is replaced, not the link
    work = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise FpoError(f"{path} is a file. Wanted the name of a folder.")
        with locks.held(target.with_name(f".{target.name}.lock"), path):
            sweep(target.parent, target.name)
            try:
                work.mkdir()
                yield work
                sync_tree(work)
                check()
                put_in_place(work, target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except Exception as error:
        _raise_plainly(path, error)
        raise


def put_in_place(work: Path, target: Path) -> None:
    """Give the folder `work` the name `target`; a folder of that name is then at `work`."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(work, target)
    elif not _exchange(work, target):  # no such call here: a moment without a folder
        old = _aside(work)
        os.replace(target, old)
        try:
            os.replace(work, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _aside(work: Path) -> Path:
    """Where the folder goes whose place `work` takes: no target's work folder bears this name."""
    number, name = work.name.removeprefix(TEMPORARY).split("-", 1)
    return work.with_name(f"{TEMPORARY}{number}{ASIDE}-{name}")


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the disk's format cannot."""
    libc, swap = ctypes.CDLL(None, use_errno=True), 2  # RENAME_EXCHANGE and RENAME_SWAP are both 2
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), swap) == 0
        at_cwd = -100
        return libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), swap) == 0
    except AttributeError:  # an old C library
        return False


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers of `name` (of anything) left in a folder. Hold its lock.

    A folder of this name that one of them had moved aside, to put its own there, comes back.
    """
    pattern = re.compile(WRITERS + (".+" if name is None else re.escape(name)))
    there = folder.iterdir() if folder.is_dir() else ()
    left = [path for path in there if pattern.fullmatch(path.name)]
    if name is not None:
        _bring_back(left, folder / name)
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _bring_back(left: list[Path], target: Path) -> None:
    """The folder that was moved aside, where what should take its place never got there."""
    for work in left:
        old = _aside(work)
        if old in left and old.is_dir() and not target.exists():
            os.replace(old, target)


def sweep_killed(folder: Path) -> None:
    """Remove what writers of folders in this one left, but for those that are at work."""
    pattern = re.compile(WRITERS + "(?P<name>.+)")
    names = {found["name"] for path in folder.iterdir() if (found := pattern.fullmatch(path.name))}
    for name in sorted(names):
        with suppress(OSError, FpoError), locks.held(folder / f".{name}.lock", folder):
            sweep(folder, name)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, where its disk can.

    Network disks and exFAT refuse it; the rename is made by then, so that is no error.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            flush(handle)
        finally:
            os.close(handle)


def flush(handle: int) -> None:
    """fsync; on macOS, where that leaves the data in the drive's own cache, through the cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # not every disk has it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def flush_in_order(handle: int) -> None:
    """The same, but on macOS only so that nothing later gets there first: no waiting.

    A killed process loses nothing; a power cut may take the last lines, and leaves no hole.
    """
    if sys.platform == "darwin":
        with suppress(OSError):  # not every disk has it
            fcntl.fcntl(handle, BARRIER)
            return
    flush(handle)


def sync_tree(folder: Path) -> None:
    """The same for everything in a folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as handle:
                flush(handle.fileno())
        sync_folder(Path(parent))


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises: ValueError for everything that is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: OSError; ValueError for a file that holds none."""
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, wanted a JSON object")
    return value


def known_object(path: Path) -> dict[str, Any]:
    """The same; {} where the file is not there or holds none."""
    with suppress(OSError, ValueError):
        return read_object(path)
    return {}


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str | None:
    """sha256 of a file's bytes; None where it cannot be read."""
    with suppress(OSError):
        return sha256_of(path)


def finite(value: Any) -> Any:
    """The value with None for every number that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


class Unwritable(FpoError):
    """Nothing could be written. need: what to make or mend before `way` helps."""

    def __init__(self, found: str, need: str, way: str = "run the command again") -> None:
        super().__init__(f"{found} {need} {way}.")
        self._found, self._need = found, need

    def by(self, way: str) -> Unwritable:
        """The same where the command goes on in another way."""
        return Unwritable(self._found, self._need, way)


def unwritable(path: Path | str, error: BaseException) -> FpoError | None:
    """The plain error for what kept `path` from being written; None if it is something else."""
    if isinstance(error, OSError) and error.errno is not None:
        code, why = error.errno, os.strerror(error.errno)
    elif str(error).startswith(_FOREIGN):
        code, why = 0, "the system refused to write (is the disk full, or the folder read-only?)"
    else:
        return None
    found = f"{path} cannot be written: {why}. What was there is untouched."
    if code in _FULL:
        return Unwritable(found, "Make room and")
    if code in _FORBIDDEN or code in _NO_PLACE:
        return FpoError(f"{found} Name another place, or mend this one.")
    return Unwritable(found, "Make room or mend its permissions, and") if code == 0 else None


def _raise_plainly(path: Path, error: Exception) -> None:
    plain = unwritable(path, error)
    if plain is not None:
        raise plain from error
