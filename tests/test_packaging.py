"""What travels in the source distribution: every source, whatever the machine that made it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lrcompress", "csrc", "tests", "docs", "examples", "bench", "tools", ".ci")
FILES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "MANIFEST.in")
MADE = {".pyc", ".so", ".o"}  # by building or running


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> set[str]:
    """Return the files of the source distribution, as a machine without nvcc lists them."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    environment = {**os.environ, "LRC_CUDA": "0", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (sources,) = folder.glob("*.egg-info/SOURCES.txt")
    return set(sources.read_text().splitlines())


def sources() -> set[str]:
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    kept = {path for path in found if path.suffix not in MADE and "__pycache__" not in path.parts}
    return {str(path.relative_to(ROOT)) for path in kept} | {"pyproject.toml", "setup.py", *FILES}


def test_every_source_is_in_the_source_distribution(listed):
    assert sources() - listed == set()
    assert {Path(name).suffix for name in listed if name.startswith("csrc/")} == {".cpp", ".cu", ".cuh", ".h"}


def test_nothing_that_was_built_is_in_it(listed):
    assert [name for name in listed if Path(name).suffix in MADE or "__pycache__" in name] == []
    assert [name for name in listed if name.startswith(("build/", ".venv/", ".git/", "demo/"))] == []


@pytest.mark.parametrize(("value", "strict"), [(None, False), ("0", False), ("1", True)])
def test_warnings_are_errors_only_where_asked_for(value, strict):
    """A checkout of a user, with a newer compiler, must build."""
    code = "import runpy; print(runpy.run_path('setup.py', run_name='setup')['WERROR'])"
    environment = {key: text for key, text in os.environ.items() if key not in ("LRC_WERROR", "CI")}
    environment |= {"LRC_CUDA": "0"} | ({} if value is None else {"LRC_WERROR": value})
    arguments = [sys.executable, "-c", f"import sys; sys.argv = ['setup.py', '--version']; {code}"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == str(strict)
