"""One writer at a time: a lock file that names its owner and dies with it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpo_mlx.errors import FpoError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def held(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `path` while `what` is written; the file is gone afterwards.

    Raises: FpoError naming the owner when another process holds it.
    """
    descriptor = acquire(path, what)
    try:
        yield
    finally:
        release(path, descriptor)


def acquire(path: Path, what: Path) -> int:
    """The locked file descriptor. The kernel lets go of it when its owner dies, however it dies."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise FpoError(
                f"{what} is being written by {owner}. "
                "Wait for it to end, or give this run another folder."
            ) from None
        except OSError as error:
            os.close(lock)
            if error.errno not in NO_LOCKS:
                raise
            raise FpoError(
                f"{what} cannot be locked against other writers: its file system has no locks "
                f"({error.strerror}). Name a folder on a local disk."
            ) from error
        except BaseException:
            os.close(lock)
            raise
        try:
            current = os.stat(path).st_ino == os.fstat(lock).st_ino
        except FileNotFoundError:
            current = False
        if current:  # else its owner removed it between our open and our lock: take the new one
            _sign(lock)
            return lock
        os.close(lock)


def release(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)  # while held: none can lose its own
    os.close(descriptor)


def _sign(lock: int) -> None:
    """Say who holds it; on a full disk the lock holds without a name."""
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        return


def owner(path: Path) -> str | None:
    """Who holds this lock file; None when nobody does."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
    except OSError:  # a file system without locks: nobody holds one
        return None
    finally:
        os.close(lock)
    return None
