"""Which cells of an example's table are computed, and how they join those of an earlier run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Job = tuple[str, Any]  # the name of a row, and a budget


def add_only(parser: argparse.ArgumentParser) -> None:
    """Let a user name what to compute."""
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="a shell pattern for 'row' or 'row, budget': compute these; the file keeps its others",
    )


def chosen(parser: argparse.ArgumentParser, jobs: Sequence[Job], only: str | None) -> list[Job]:
    """Return the jobs that match, all without a pattern; end the program where none does."""
    found = [
        (name, budget)
        for name, budget in jobs
        if only is None or fnmatchcase(name, only) or fnmatchcase(f"{name}, {budget}", only)
    ]
    if not found:
        parser.error(f"--only must match one of {[f'{n}, {b}' for n, b in jobs]}, got {only!r}")
    return found


def joined(path: Path, key: str, jobs: Sequence[Job], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results in the order of the jobs, those not computed now from the file, if any."""
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    every = {(row[key], row["budget"]): row for row in [*earlier, *rows]}
    return [every[job] for job in jobs if job in every]
