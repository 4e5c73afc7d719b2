"""The walls of ARCHITECTURE.md, checked on the source text itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lrcompress"

# A room may import the rooms named here, and no others.
MAY_IMPORT = {
    "types": set(),
    "files": {"types"},
    "ops": {"_C", "types"},
    "nn": {"ops", "types"},
    "calibrate": {"ops", "files", "types"},
    "factorize": {"ops", "types"},
    "allocate": {"types"},
    "codec": {"files", "types"},
    "report": {"types"},
    "rewrite": {"nn", "types"},
    "measure": {"calibrate", "rewrite", "nn", "types"},
    "removal": {"calibrate", "rewrite", "nn", "types"},
    "subject": {"calibrate", "rewrite", "types"},
    "reconstruct": {"calibrate", "factorize", "allocate", "removal", "rewrite", "subject", "nn", "types"},
    "refine": {"calibrate", "factorize", "rewrite", "subject", "types"},
    "planning": {
        "reconstruct",
        "refine",
        "calibrate",
        "factorize",
        "allocate",
        "measure",
        "removal",
        "subject",
        "types",
    },
    "presets": {"factorize", "allocate", "types"},
    "pipeline": {
        "removal",
        "reconstruct",
        "refine",
        "planning",
        "calibrate",
        "factorize",
        "codec",
        "rewrite",
        "measure",
        "presets",
        "types",
    },
    "doctor": {"_C"},
    "sources": {"samples", "types"},
    "samples": {"types"},
    "demo": {"calibrate", "measure", "pipeline", "presets", "report", "types"},
    "arguments": set(),
    "steps": {
        "arguments",
        "calibrate",
        "measure",
        "pipeline",
        "presets",
        "refine",
        "rewrite",
        "sources",
        "types",
    },
    "cli": {
        "arguments",
        "demo",
        "doctor",
        "files",
        "measure",
        "pipeline",
        "report",
        "sources",
        "steps",
        "types",
    },
    "__main__": {"cli"},
}


def imported_rooms(path: Path) -> set[str]:
    """Names of the rooms that a source file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lrcompress":
            tail = (node.module or "").split(".")[1:]
            rooms |= {tail[0]} if tail else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lrcompress.")}
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_downwards(path):
    room = room_of(path)
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def test_every_wall_has_a_room():
    assert set(MAY_IMPORT) == {room_of(path) for path in sources()}


@pytest.mark.parametrize("room", ["types", "allocate", "report"])
def test_rooms_of_plain_numbers_never_import_torch(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE), path


def test_csrc_never_includes_torch():
    files = [p for p in (ROOT / "csrc").rglob("*.*") if p.is_file()]
    assert files
    for path in files:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_cuda_switch_is_in_one_file():
    files = [p for p in (ROOT / "csrc").rglob("*.*") if p.is_file()]
    assert [p.name for p in files if "LRC_WITH_CUDA" in p.read_text()] == ["dispatch.h"]


def test_files_stay_small():
    code = [p for room in ("lrcompress", "csrc") for p in (ROOT / room).rglob("*.*")]
    code = [p for p in code if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert [p.name for p in code if len(p.read_text().splitlines()) > 400] == []
