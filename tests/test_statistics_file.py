"""Statistics on disk: what was damaged, or cannot be, is refused."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_statistics import network, samples

import lrcompress as lrc
from lrcompress.files.tensors import checksum


@pytest.fixture(scope="module")
def whole():
    return lrc.collect(network(), [samples()], gradients=True)


def exact(statistics):
    """Return everything as plain values, to be compared to the bit."""
    parts = ("autocorrelation", "mean", "gradient")
    layers = {
        name: ([getattr(known, part).tolist() for part in parts], known.samples, known.share)
        for name, known in statistics.layers.items()
    }
    return layers, statistics.fingerprint, statistics.batches, statistics.unreached


def _about(folder, **changes):
    """Write a good file with some metadata or tensors replaced, checksum and all; None removes."""
    path = folder / "s"
    lrc.collect(network(), [samples()], gradients=True).save(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    del about["checksum"]
    tensors = load_file(path) | {key: value for key, value in changes.items() if "/" in key}
    about |= {key: value for key, value in changes.items() if "/" not in key}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    about = {key: value for key, value in about.items() if value is not None}
    save_file(tensors, path, {"checksum": checksum(tensors, about)} | about)
    return path


def test_a_file_with_another_right_value_is_read(tmp_path):
    counts = json.dumps({"stem": 5, "inner": 6, "point": 7, "fc": 8})
    found = lrc.Statistics.load(_about(tmp_path, samples=counts, batches="3"))
    assert (found.batches, found.layers["fc"].samples) == (3, 8)


def several(**values):
    return json.dumps(dict.fromkeys(("stem", "inner", "point", "fc"), 1) | values)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "2"},
        {"format": None},
        {"checksum": "0" * 64},
        {"fingerprint": None},
        {"samples": "{"},
        {"samples": "[1]"},
        {"samples": '{"fc": 1}'},
        {"samples": several(fc="many")},
        {"samples": several(fc=None)},
        {"samples": several(fc=0)},
        {"samples": several(fc=True)},
        {"samples": several(fc=1.5)},
        {"samples": several(fc=10**40)},
        {"samples": several(other=3)},
        {"samples": "[" * 900 + "]" * 900},
        {"shares": several(fc="all")},
        {"shares": several(fc=None)},
        {"shares": several(fc=-1)},
        {"shares": several(fc=10**400)},
        {"shares": several().replace("1", "NaN")},
        {"shares": several(other=1)},
        {"shares": None},
        {"batches": "few"},
        {"batches": "true"},
        {"unreached": "3"},
        {"unreached": "[3]"},
        {"unreached": "{"},
        {"unreached": "[" * 100_000},
        {"fc/mean": None},
        {"fc/mean": torch.zeros(1, 5, dtype=torch.float64)},
        {"fc/mean": torch.zeros(6, dtype=torch.float64)},
        {"fc/mean": torch.zeros(1, 6, dtype=torch.int64)},
        {"fc/mean": torch.full((1, 6), torch.nan, dtype=torch.float64)},
        {"fc/autocorrelation": torch.zeros(1, 6, 5, dtype=torch.float64)},
        {"fc/gradient": torch.zeros(5, 4, dtype=torch.float64)},
        {"other/mean": torch.zeros(1, 6, dtype=torch.float64)},
    ],
    ids=lambda changes: ascii(changes)[:60],
)
def test_files_that_cannot_be_are_refused(tmp_path, changes):
    path = _about(tmp_path, **changes)
    with pytest.raises(lrc.FormatError, match=r"s: ") as refused:
        lrc.Statistics.load(path)
    assert len(str(refused.value)) < 2000


def test_a_changed_byte_is_found_or_changes_nothing(tmp_path, whole):
    path = tmp_path / "s"
    whole.save(path)
    content, refused = path.read_bytes(), 0
    for i in range(0, len(content), max(1, len(content) // 500)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            found = lrc.Statistics.load(path)
            assert exact(found) == exact(whole)
        except lrc.FormatError:
            refused += 1
    assert refused > 490


def test_files_that_are_not_statistics_are_refused(tmp_path, whole):
    good = tmp_path / "good"
    whole.save(good)
    for name, content in {"empty": b"", "text": b"hello" * 9, "cut": good.read_bytes()[:-8]}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "cut", "missing", "."):
        with pytest.raises(lrc.FormatError):
            lrc.Statistics.load(tmp_path / name)


@pytest.mark.parametrize("target", ["pipe", "device"])
def test_only_regular_files_are_read(tmp_path, target):
    if target == "pipe":
        os.mkfifo(tmp_path / "s")
    else:
        (tmp_path / "s").symlink_to("/dev/zero")
    with pytest.raises(lrc.FormatError, match="regular file"):
        lrc.Statistics.load(tmp_path / "s")


def test_a_file_is_replaced_in_one_step(tmp_path, whole, monkeypatch):
    whole.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            dataclasses.replace(whole, batches=7).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".s.0123456789abcdef").write_text("left by a writer that was killed")
    dataclasses.replace(whole, batches=7).save(tmp_path / "s")
    assert lrc.Statistics.load(tmp_path / "s").batches == 7
    assert len(list(tmp_path.iterdir())) == 1
