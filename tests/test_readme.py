"""README.md says what the benchmarks printed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_documents_name_only_files_that_exist():
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        words = (ROOT / document).read_text().replace("`", " ").replace("(", " ").replace(")", " ").split()
        for word in words:
            inside = word.startswith(("lrcompress/", "csrc/", "tests/", "bench/", "tools/", "examples/"))
            if inside and not set("<*>") & set(word):
                assert (ROOT / word.rstrip(".,:;/")).exists(), f"{document}: {word}"
