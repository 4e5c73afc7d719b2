"""The folder of an artefact: replaced in one step, and what is not ours in it left alone."""

import copy
import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_artefact import CONFIG, Net, assert_same, compressed
from test_artefact_hostile import rewrite_config
from torch import nn

import lrcompress as lrc


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, nn.Module, Path]:
    """Return an original, its compressed copy and the folder that holds it."""
    model = Net().eval()
    small, plan = compressed(model)
    lrc.save(small, plan, tmp_path / "out")
    return model, small, tmp_path / "out"


def weights_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != CONFIG]


def changed(small: nn.Module, factor: float = 2) -> nn.Module:
    new = copy.deepcopy(small)
    with torch.no_grad():
        new.conv.U.mul_(factor)
    return new


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- replacing an artefact ----


def test_a_second_save_leaves_one_weights_file(saved):
    model, small, folder = saved
    new = changed(small)
    for each in (new, new, small):
        lrc.save(each, lrc.load_plan(folder), folder)
        assert len(weights_files(folder)) == 1
        assert_same(lrc.load(folder, model), each)


@pytest.mark.parametrize(("owner", "step"), [(os, 0), (os, 1), (os, 2), (Path, 0)], ids=str)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_crash_leaves_the_old_artefact_whole(saved, monkeypatch, owner, step, error):
    model, small, folder = saved
    plan, name = lrc.load_plan(folder), "fsync" if owner is os else "replace"
    genuine, calls, before = getattr(owner, name), [], contents(folder)

    def crash(*args):
        calls.append(args)
        if len(calls) > step:
            raise error
        return genuine(*args)

    new = changed(small)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(type(error)):
            lrc.save(new, plan, folder)
    assert len(calls) == step + 1
    assert contents(folder) == before
    lrc.save(new, plan, folder)
    assert_same(lrc.load(folder, model), new)


def test_a_crash_while_clearing_up_leaves_the_new_artefact_whole(saved, monkeypatch):
    model, small, folder = saved

    def crash(self: Path, missing_ok: bool = False) -> None:
        raise OSError("no")

    plan, new = lrc.load_plan(folder), changed(small)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(OSError, match="no"):
            lrc.save(new, plan, folder)
    assert_same(lrc.load(folder, model), new)
    lrc.save(new, plan, folder)
    assert len(weights_files(folder)) == 1


def test_a_torn_write_is_never_seen(saved, monkeypatch):
    """Power may fail between any two system calls: the files are whole before their names exist."""
    model, small, folder = saved
    genuine = Path.replace

    def check(self: Path, target: Path) -> Path:
        assert_same(lrc.load(folder, model), small)
        return genuine(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", check)
        lrc.save(changed(small), lrc.load_plan(folder), folder)
    assert_same(lrc.load(folder, model), changed(small))


def test_files_have_the_permissions_of_any_new_file(saved):
    _, _, folder = saved
    (folder / "other").write_text("")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1


# ---- whose folder it is ----


def hub_checkpoint(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"model_type": "bert"}))
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(2)}, folder / f"model-0000{i}-of-00002.safetensors")


def weights_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"weights")


def shards_alone(folder: Path) -> None:
    save_file({"w": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")


def name_of_ours(folder: Path) -> None:
    (folder / "model-0123456789abcdef.safetensors").write_bytes(b"not of an artefact")


def other_config(folder: Path) -> None:
    (folder / CONFIG).write_text('{"format": "other"}')


def no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("learning_rate = 1")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / CONFIG)


def subfolder(folder: Path) -> None:
    (folder / CONFIG).mkdir()


def dangling_link(folder: Path) -> None:
    (folder / CONFIG).symlink_to("nowhere")


def device(folder: Path) -> None:
    (folder / CONFIG).symlink_to("/dev/zero")


def later_version(folder: Path) -> None:
    (folder / CONFIG).write_text('{"format": "lrcompress", "format_version": 2}')


FOREIGN = [
    hub_checkpoint,
    weights_alone,
    shards_alone,
    name_of_ours,
    other_config,
    no_json,
    pipe,
    subfolder,
    dangling_link,
    device,
    later_version,
]


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(saved, tmp_path, make):
    _, small, folder = saved
    other = tmp_path / "other"
    other.mkdir()
    make(other)
    names = sorted(path.name for path in other.iterdir())
    before = {} if make in (device, pipe) else contents(other)
    with pytest.raises(lrc.FormatError, match="nothing was saved"):
        lrc.save(small, lrc.load_plan(folder), other)
    assert sorted(path.name for path in other.iterdir()) == names
    assert make in (device, pipe) or contents(other) == before


def test_a_file_in_the_place_of_the_folder_is_refused(saved, tmp_path):
    _, small, folder = saved
    (tmp_path / "file").write_text("mine")
    with pytest.raises(lrc.FormatError, match="file must be a folder"):
        lrc.save(small, lrc.load_plan(folder), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_artefact_is_not_replaced(saved):
    _, small, folder = saved
    plan, text = lrc.load_plan(folder), (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"recipe": "', '"recipe": "x'))
    before = contents(folder)
    with pytest.raises(lrc.FormatError, match="checksum"):
        lrc.save(small, plan, folder)
    assert contents(folder) == before


def test_other_files_of_an_artefact_s_folder_stay(saved):
    model, small, folder = saved
    plan = lrc.load_plan(folder)
    names = [
        "README.md",
        ".gitattributes",
        "model-final.safetensors",
        "model-0123456789abcdef.safetensors",
        ".model-0123456789abcdef.safetensors",
        ".config.json.backup",
        "statistics.safetensors",
    ]
    for name in names:
        (folder / name).write_text(name)
    (folder / "sub").mkdir()
    for each in (changed(small), small):
        lrc.save(each, plan, folder)
        assert all((folder / name).read_text() == name for name in names)
        assert len(weights_files(folder)) == len(names) + 2
        assert_same(lrc.load(folder, model), each)


def test_an_artefact_cannot_name_a_file_to_be_removed(saved):
    """Its checksum is right and it names the user's notes as its weights."""
    model, small, folder = saved
    plan, config = lrc.load_plan(folder), json.loads((folder / CONFIG).read_text())
    for name in ("notes.txt", CONFIG):
        (folder / "notes.txt").write_text("mine")
        (folder / CONFIG).write_text(json.dumps(config))
        rewrite_config(folder, {"weights": name})
        lrc.save(small, plan, folder)
        assert (folder / "notes.txt").read_text() == "mine"
        assert_same(lrc.load(folder, model), small)


@pytest.mark.parametrize("change", [{"params": 3}, {"objective": float("inf")}, {"latency": -1}], ids=str)
def test_a_plan_that_could_not_be_read_is_not_written(saved, change):
    _, small, folder = saved
    before = contents(folder)
    with pytest.raises(lrc.PlanError):
        lrc.save(small, dataclasses.replace(lrc.load_plan(folder), **change), folder)
    assert contents(folder) == before
