"""Regular files only: a pipe would be waited for, and a device read without end."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from lrcompress.types import FormatError

FLAGS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # opening neither waits nor has effects


def opened(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        FormatError: there is none, it cannot be read, or it is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | FLAGS)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise FormatError(f"cannot read {str(path)!r}: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"cannot read {path}: it must be a regular file")
    return os.fdopen(descriptor, "rb")


def text_of(
    path: Path,
    longest: int,  # bytes
) -> str:
    """Read a whole text in UTF-8.

    Raises:
        FormatError: it cannot be read, is longer, or is no UTF-8.
    """
    with opened(path) as file:
        try:
            raw = file.read(longest + 1)
            if len(raw) > longest:
                raise FormatError(f"{path} must have at most {longest} bytes")
            return raw.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"cannot read {path}: {error}") from None
