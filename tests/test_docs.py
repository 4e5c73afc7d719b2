"""README.md and docs/ say what the benchmarks printed, name files that exist, and show code that runs."""

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import lrcompress as lrc

ROOT = Path(__file__).parents[1]
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*SHOWN, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("lrcompress/", "csrc/", "tests/", "bench/", "tools/", "examples/", "docs/")


def named(document):
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("tool", ["tables", "picture"])
def test_what_is_made_of_results_is_up_to_date(tool):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_documents_name_only_files_that_exist(document):
    text = document.read_text()
    for word in re.sub(r"[`()\[\]]", " ", text).split():
        if word.startswith(FOLDERS) and not set("<*>{}") & set(word):
            assert (ROOT / word.rstrip(".,:;/")).exists(), word
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def network():
    """Return a network with the names that the documents use."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(16),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, stride=2, padding=1),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(32, 20),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


@pytest.mark.parametrize("document", [d for d in SHOWN if "```python" in d.read_text()], ids=named)
def test_every_python_block_runs(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    batches = [torch.randn(100, 3, 8, 8) for _ in range(3)]
    values = {"lrc": lrc, "torch": torch, "nn": nn, "model": network(), "batches": batches, "x": batches[0]}
    values["stats"] = lrc.collect(values["model"], batches)
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        exec(compile(block, named(document), "exec"), values)
