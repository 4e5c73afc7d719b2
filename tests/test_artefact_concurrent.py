"""An artefact is whole at every moment, whoever saves, loads or is killed in its folder."""

import errno
import fcntl
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_artefact import CONFIG, Net, assert_same, compressed
from test_artefact_folder import changed, contents, weights_files
from torch import nn

import lrcompress as lrc
from lrcompress import files
from lrcompress.codec import folder as folders


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, nn.Module, Path]:
    """Return an original, its compressed copy and the folder that holds it."""
    model = Net().eval()
    small, plan = compressed(model)
    lrc.save(small, plan, tmp_path / "out")
    return model, small, tmp_path / "out"


# ---- killed savers ----


def forked(work: Callable[[], None]) -> int:
    """Run some work in a process of its own, which ends with exit code 0, 1 after an error, or its signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where a pool of threads runs
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], None]) -> Callable[[], None]:
    """Return the work of a process that is killed before its nth look at a file, or the flush after it."""

    def run() -> None:
        left = [step]

        def count(event: str, _: object = None) -> None:
            if event in ("open", "os.rename", "os.remove", "os.listdir", "os.scandir", "os.utime", "fsync"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        genuine = os.fsync
        os.fsync = lambda descriptor: (count("fsync"), genuine(descriptor))[1]
        sys.addaudithook(count)
        work()

    return run


@pytest.mark.parametrize("first", [True, False], ids=["first save", "over an artefact"])
def test_a_saver_killed_at_any_step_leaves_a_whole_artefact_and_nothing_for_long(saved, tmp_path, first):
    model, small, there = saved
    plan, new, last = lrc.load_plan(there), changed(small), changed(small, 3)
    step, signals = 0, []
    while not signals or signals[-1]:
        folder = tmp_path / str(step)
        if not first:
            lrc.save(small, plan, folder)
        signals.append(ended(forked(killed_at(step, lambda: lrc.save(new, plan, folder)))))  # noqa: B023
        if (folder / CONFIG).exists():
            loaded = lrc.load(folder, model)
            kept = new if first or torch.equal(loaded.conv.U, new.conv.U) else small
            assert_same(loaded, kept)
        else:
            assert first
        lrc.save(last, plan, folder)
        assert len(weights_files(folder)) == 1, step
        assert_same(lrc.load(folder, model), last)
        step += 1
    assert set(signals[:-1]) == {-signal.SIGKILL}
    assert len(signals) > 8


def test_what_a_live_saver_writes_stays(saved):
    _, small, folder = saved
    plan = lrc.load_plan(folder)
    with files.draft(folder / CONFIG) as draft:
        weights = folder / folders.weights_name(draft.token)
        weights.write_text("half")
        lrc.save(changed(small), plan, folder)
        assert weights.read_text() == "half"
        assert draft.path.exists()
        kept = contents(folder)
    for name, content in kept.items():  # as if it had been killed
        (folder / name).write_bytes(content)
    lrc.save(small, plan, folder)
    assert len(weights_files(folder)) == 1


# ---- at the same time ----


def test_any_number_of_savers_and_readers_some_of_them_killed(saved):
    model, small, folder = saved
    plan = lrc.load_plan(folder)
    end = time.monotonic() + 4

    def save(factor: int) -> Callable[[], None]:
        mine = [changed(small, factor), changed(small, factor + 0.5)]

        def work() -> None:
            while time.monotonic() < end:
                for each in mine:
                    lrc.save(each, plan, folder)

        return work

    def read() -> None:
        while time.monotonic() < end:
            factor = float((lrc.load(folder, model).conv.U / small.conv.U).detach().nanmean())
            assert abs(2 * factor - round(2 * factor)) < 1e-3

    stay = [forked(save(factor)) for factor in range(2, 5)] + [forked(read) for _ in range(2)]
    while time.monotonic() < end - 0.5:
        victim = forked(save(7))
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        ended(victim)
    assert [ended(child) for child in stay] == [0] * len(stay)
    lrc.save(small, plan, folder)
    assert len(weights_files(folder)) == 1
    assert_same(lrc.load(folder, model), small)


def test_the_first_savers_of_a_folder_take_one_another_for_no_stranger(saved, tmp_path):
    model, small, there = saved
    plan = lrc.load_plan(there)
    for i in range(5):
        folder = tmp_path / str(i)
        children = [forked(lambda: lrc.save(small, plan, folder)) for _ in range(4)]  # noqa: B023
        assert [ended(child) for child in children] == [0] * 4
        assert len(weights_files(folder)) == 1
        assert_same(lrc.load(folder, model), small)


@pytest.mark.parametrize("step", range(7))
def test_a_whole_save_at_any_step_of_another_breaks_neither(saved, monkeypatch, step):
    """Even where the second does not get the lock, as when the first was stopped."""
    model, small, folder = saved
    plan, between, calls = lrc.load_plan(folder), changed(small, 3), []
    monkeypatch.setattr(folders, "_LONGEST_WAIT", 0.01)

    def interleaved(genuine: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(genuine)
            if len(calls) == step + 1:
                lrc.save(between, plan, folder)
                assert_same(lrc.load(folder, model), between)
            return genuine(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, interleaved(getattr(owner, name)))
    lrc.save(changed(small), plan, folder)
    assert len(calls) > step
    loaded = lrc.load(folder, model)
    assert_same(loaded, between if torch.equal(loaded.conv.U, between.conv.U) else changed(small))


def test_a_reader_whose_weights_are_replaced_reads_the_new_ones(saved, monkeypatch):
    model, small, folder = saved
    plan, genuine, calls = lrc.load_plan(folder), files.opened, []

    def opened(path: Path):
        if path.name != CONFIG and len(calls) < 3:
            calls.append(path)
            lrc.save(changed(small, len(calls)), plan, folder)
        return genuine(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "opened", opened)
        loaded = lrc.load(folder, model)
    assert len(calls) == 3
    assert_same(loaded, changed(small, 3))


def test_no_link_leads_a_saver_out_of_the_folder(saved, tmp_path):
    model, small, folder = saved
    (tmp_path / "mine").write_text("mine")
    (name,) = weights_files(folder)
    token = name.removeprefix("model-").removesuffix(".safetensors")
    for target in ("mine", "nothing"):
        (folder / f".config.json.{token}").symlink_to(tmp_path / target)
        with pytest.raises(OSError, match=token):
            lrc.save(changed(small), lrc.load_plan(folder), folder)
        (folder / f".config.json.{token}").unlink()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert_same(lrc.load(folder, model), small)
    assert weights_files(folder) == [name]


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_will_do(saved, monkeypatch):
    """What killed savers left stays there: nobody can tell it from what live ones write."""
    model, small, folder = saved
    plan, left = (
        lrc.load_plan(folder),
        [".config.json.0123456789abcdef", "model-0123456789abcdef.safetensors"],
    )
    for name in left:
        (folder / name).write_text("")
    monkeypatch.setattr(fcntl, "flock", without_locks)
    for each in (changed(small), small):
        lrc.save(each, plan, folder)
        assert_same(lrc.load(folder, model), each)
    assert len(weights_files(folder)) == 1 + len(left)
    monkeypatch.undo()
    lrc.save(small, plan, folder)
    assert len(weights_files(folder)) == 1


@pytest.fixture
def _read_only(saved) -> Iterator[None]:
    _, _, folder = saved
    folder.chmod(0o555)
    yield
    folder.chmod(0o755)


@pytest.mark.usefixtures("_read_only")
def test_a_reader_writes_nothing(saved):
    model, small, folder = saved
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert_same(lrc.load(folder, model), small)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
