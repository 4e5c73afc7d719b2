"""An artefact that was damaged or changed is refused: never a crash, never a silently wrong model."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from golden_models import Narrowed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_artefact import CONFIG, Net, assert_same, compressed
from test_golden import GOLDEN
from torch import nn

import lrcompress as lrc
from lrcompress import cli
from lrcompress.codec import artefact as codec


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, nn.Module, Path]:
    """Return an original, its compressed copy and the folder that holds it."""
    model = Net().eval()
    small, plan = compressed(model)
    lrc.save(small, plan, tmp_path / "out")
    return model, small, tmp_path / "out"


def assert_refused(folder: Path, model: nn.Module) -> None:
    with pytest.raises(lrc.FormatError):
        lrc.load(folder, model)


def positions(size: int) -> list[int]:
    """Every position at both ends and 60 between them."""
    ends = {*range(min(size, 24)), *range(max(0, size - 24), size)}
    return sorted(ends.union(range(0, size, max(1, size // 60))))


@pytest.mark.parametrize(
    ("pattern", "mask"),
    [(CONFIG, 0x80), (CONFIG, 0xFF), ("model-*", 0x01), ("model-*", 0x80), ("model-*", 0xFF)],
)
def test_a_flipped_byte_is_found(saved, pattern, mask):
    model, _, folder = saved
    path = next(folder.glob(pattern))
    whole = path.read_bytes()
    for i in positions(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])
        assert_refused(folder, model)
    path.write_bytes(whole)
    lrc.load(folder, model)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_replaced_byte_is_found_or_changes_nothing(saved, data):
    """White space, the case of an exponent and a number's last digit may say the same."""
    model, small, folder = saved
    path = folder / CONFIG
    whole = path.read_bytes()
    i, new = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:i] + bytes([new]) + whole[i + 1 :])
    try:
        assert_same(lrc.load(folder, model), small)
    except lrc.FormatError:
        assert new != whole[i]
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("pattern", [CONFIG, "model-*.safetensors"])
def test_a_cut_file_is_found(saved, pattern):
    model, _, folder = saved
    path = next(folder.glob(pattern))
    whole = path.read_bytes()
    for length in positions(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(folder, model)
    path.write_bytes(whole + b"x")
    assert_refused(folder, model)


def test_missing_files_are_named(saved, tmp_path):
    model, _, folder = saved
    with pytest.raises(lrc.FormatError, match=r"nowhere.config\.json"):
        lrc.load(tmp_path / "nowhere", model)
    with pytest.raises(lrc.FormatError, match=r"nowhere.config\.json"):
        lrc.load_plan(tmp_path / "nowhere")
    weights = next(folder.glob("model-*"))
    weights.unlink()
    lrc.load_plan(folder)
    with pytest.raises(lrc.FormatError, match=weights.name):
        lrc.load(folder, model)
    weights.mkdir()
    assert_refused(folder, model)


def rewrite_config(folder: Path, changes: dict) -> None:
    """Change config.json and give it the checksum of its new contents, as a hostile writer would."""
    config = json.loads((folder / CONFIG).read_text())
    del config["checksum"]
    config |= changes
    config["checksum"] = codec._checksum(config)
    (folder / CONFIG).write_text(json.dumps(config))


FIELDS = ["format", "format_version", "weights", "sha256", "aliases", "buffers", "plan", "versions"]
OF_OTHER_TYPES = (None, 1.5, True, "", "x", [[1]], [{}], [None], {"a": [1]})
NO_FILES = ("../x", "/etc/passwd", "a/b", "..", ".", "a\0b", "\ud800", "x" * 5000)
NO_ALIASES = ({"a": {}}, {"a": 1}, {"a": None}, {"a": "nowhere"}, {"a": "a"}, {})
OTHER_TENSORS = ("norm.weight", "head.weight", "norm.num_batches_tracked")
HOSTILE = [
    *((field, wrong) for field in FIELDS for wrong in OF_OTHER_TYPES),
    *(("weights", name) for name in NO_FILES),
    *(("aliases", wrong) for wrong in NO_ALIASES),
    *(("aliases", {"head.weight": name}) for name in OTHER_TENSORS),
    *(("buffers", wrong) for wrong in ([], ["shift"], ["shift", "steps", "scale"], ["nowhere"])),
    ("format_version", 0),
    ("format_version", 2),
    ("sha256", "0" * 64),
]


@pytest.mark.parametrize(("field", "wrong"), HOSTILE, ids=lambda v: ascii(v)[:30])
def test_a_hostile_config_is_refused(saved, field, wrong):
    model, _, folder = saved
    if field == "versions" and isinstance(wrong, dict):
        wrong = []  # any dict is a record of versions
    rewrite_config(folder, {field: wrong})
    assert_refused(folder, model)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("weight_shape",), []),
        (("weight_shape",), [8, 4, 0, 3]),
        (("conv_groups",), 0),
        (("name",), 3),
        (("calls",), [{"repeats": 1.0, "input_size": [3], "output_size": []}]),
        (("calls",), [{"repeats": None, "input_size": [3, 3], "output_size": [3, 3]}]),
    ],
    ids=str,
)
def test_a_hostile_plan_is_refused(saved, path, wrong):
    model, _, folder = saved
    plan = json.loads((folder / CONFIG).read_text())["plan"]
    plan["layers"][0]["layer"][path[0]] = wrong
    rewrite_config(folder, {"plan": plan})
    assert_refused(folder, model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"lrcompress"',
        "{}",
        '{"format": "other"}',
        "[" * 20_000,
        '{"format": "lrcompress", "format_version": 1, "a": ' + "[" * 900 + "]" * 900 + "}",
        '{"format": "lrcompress", "format_version": ' + "1" * 5000 + "}",
        "\ud800",
        "\0",
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_other_texts_are_no_artefacts(saved, text):
    model, _, folder = saved
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_refused(folder, model)
    with pytest.raises(lrc.FormatError):
        lrc.load_plan(folder)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ((1, "coupling", "channels"), 2**26),
        ((1, "coupling", "channels"), 2**40),
        ((1, "coupling", "consumers", 0, "width"), 2**40),
        ((1, "coupling", "consumers", 0, "offset"), 2**40),
        ((2, "coupling", "followers", 0, "width"), 2**26),
        ((1, "coupling", "producers"), ["0", "2"]),
        ((1, "coupling", "consumers", 0, "name"), "5"),
        ((0, "coupling", "channels"), 11),
        ((0, "coupling", "consumers"), [{"name": name, "offset": 0, "width": 1} for name in ("0", "2")]),
        ((0, "coupling", "consumers", 0, "width"), 2),
        ((1, "penalty"), -1.0),
    ],
    ids=str,
)
def test_removals_are_compared_with_the_model_before_anything_is_listed(tmp_path, path, wrong):
    """Both when a model is loaded and when one is made by the plan."""
    shutil.copytree(GOLDEN / "removal", tmp_path / "out")
    plan = json.loads((tmp_path / "out" / CONFIG).read_text())["plan"]
    inner = plan["removals"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    rewrite_config(tmp_path / "out", {"plan": plan})
    start = time.process_time()
    with pytest.raises(lrc.CompressionError):
        lrc.load(tmp_path / "out", Narrowed().eval())
    with pytest.raises(lrc.CompressionError):
        lrc.apply(Narrowed().eval(), lrc.load_plan(tmp_path / "out"), batches=[torch.randn(64, 12)])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("last", ["head", "5"])
def test_a_model_without_a_layer_whose_channels_went_is_refused_by_name(last):
    other = nn.Sequential()
    for name, module in Narrowed().eval().named_children():
        if name != "5":
            other.add_module(name, module)
    other.add_module(last, nn.Linear(8, 6) if last != "5" else nn.Identity())
    with pytest.raises(lrc.PlanError, match="'5'"):
        lrc.load(GOLDEN / "removal", other)


def test_messages_are_short_whatever_they_name():
    for text in ("x" * 10**6, "ü" * 10**5, "\ud800" * 10**4):
        error = lrc.PlanError(f"begin {text} end")
        assert len(str(error).encode("utf-8", "backslashreplace")) < 2000
        assert str(error).startswith("begin ")
        assert str(error).endswith(" end")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(lrc.PlanError("short")) == "short"


def test_pipes_and_devices_are_refused_at_once(saved, tmp_path):
    model, _, folder = saved
    weights = next(folder.glob("model-*"))
    for path in (weights, folder / CONFIG):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert_refused(folder, model)
        for target in ("/dev/zero", "/dev/tty", tmp_path):
            path.unlink()
            path.symlink_to(target)
            assert_refused(folder, model)
        path.unlink()
        (tmp_path / path.name).write_bytes(kept)
        path.symlink_to(tmp_path / path.name)  # as hubs store files
        lrc.load(folder, model)


def test_the_command_line_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(lrc.FormatError, match="regular file"):
        cli._read_plan(tmp_path / "plan.json")
