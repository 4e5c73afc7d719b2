"""Which rows of an example's table are computed, and how they join those of an earlier run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


def add_only(parser: argparse.ArgumentParser) -> None:
    """Let a user name the rows to compute."""
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="compute the rows whose name matches this shell pattern; the file keeps its others",
    )


def chosen(parser: argparse.ArgumentParser, names: Iterable[str], only: str | None) -> list[str]:
    """Return the names that match, all without a pattern; end the program where none does."""
    known = list(names)
    found = [name for name in known if fnmatchcase(name, only or "*")]
    if not found:
        parser.error(f"--only must match one of {known}, got {only!r}")
    return found


def joined(path: Path, key: str, names: Iterable[str], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in the order of the names, those of names not computed now from the file, if any."""
    computed = {row[key] for row in rows}
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    every = [row for row in earlier if row[key] not in computed] + rows
    return [row for name in names for row in every if row[key] == name]
