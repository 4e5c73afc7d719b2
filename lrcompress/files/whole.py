"""Files that appear whole or not at all, and what killed writers leave of them.

A file is written under a name of its own beside the one that it becomes, and renamed once it is whole and on
the disk. Its writer holds a lock on it: the system frees the lock of a process that is gone, so what a killed
writer left can be told from what a live one writes, on this machine and over NFS. Where a file system has no
locks nothing is ever taken for abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrcompress.files.regular import FLAGS

_TOKEN = "[0-9a-f]{16}"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclass(frozen=True)
class Draft:
    """A file that is being written: ``.<name>.<token>``, the token one that no other draft has."""

    path: Path
    token: str
    file: io.BufferedWriter

    def become(self, target: Path) -> None:
        """Take the place of the target, in one step."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.path.replace(target)


@contextmanager
def draft(target: Path) -> Iterator[Draft]:
    """Write a draft of a file; if it has not become the file by the end, it is removed.

    Raises:
        OSError: the folder cannot be written.
    """
    made = _new(target)
    with made.file:
        try:
            yield made
        finally:
            made.path.unlink(missing_ok=True)


def _new(target: Path) -> Draft:
    while True:
        token = secrets.token_hex(8)
        path = target.with_name(f".{target.name}.{token}")
        file = path.open("xb")  # with the permissions of any new file
        if locked(file.fileno()) is not False and _is_at(path, file.fileno()):
            return Draft(path, token, file)
        file.close()  # somebody took it for abandoned before it was locked


def abandoned(target: Path) -> Iterator[tuple[Path, str]]:
    """Yield each draft whose writer is gone, path and token, locked while the caller removes it."""
    named = re.compile(rf"\.{re.escape(target.name)}\.({_TOKEN})")
    for path in sorted(target.parent.iterdir()):
        match = named.fullmatch(path.name)
        if match is None:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | FLAGS)
        except OSError:  # gone by now, or another user's
            continue
        try:
            whole = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if whole and locked(descriptor) and _is_at(path, descriptor):
                yield path, match.group(1)
        finally:
            os.close(descriptor)


def locked(descriptor: int) -> bool | None:
    """Lock a file or folder until it is closed; False if another holds it, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Say whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def flushed(folder: Path) -> None:
    """Make the names in a folder outlast a power cut, in the order of these calls."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
