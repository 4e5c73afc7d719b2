"""Who may write what in an artefact's folder while others save and read there.

A saver's weights have a name that nobody else's have, and config.json, renamed into place last, names them:
at every moment the folder holds one whole artefact. Savers never wait for one another's weights, and readers
take no lock, so they can be anywhere. What goes: the weights that the replaced config.json named, and those
of savers that were killed, which their drafts of config.json name. Nothing else in the folder is touched.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrcompress import files

CONFIG = "config.json"

_WEIGHTS = re.compile("model-([0-9a-f]{16})[.]safetensors")
# Of checkpoints of any framework: a folder that holds such a file without a config.json is somebody's model.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_LONGEST_WAIT = 10.0  # seconds


def weights_name(token: str) -> str:
    """Name the weights of a saver by the token of its draft."""
    return f"model-{token}.safetensors"


def foreign_weights(folder: Path) -> list[str]:
    """Name the weights in a folder without config.json that no saver of ours writes or was killed writing."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix in _ENDINGS]
    drafts = {path.name for path in folder.iterdir()}
    return sorted(path.name for path in found if _draft_of(path.name) not in drafts and path.exists())


def _draft_of(weights: str) -> str | None:
    match = _WEIGHTS.fullmatch(weights)
    return None if match is None else f".{CONFIG}.{match.group(1)}"


@contextmanager
def publishing(folder: Path) -> Iterator[None]:
    """Let one saver at a time see what it replaces: a matter of milliseconds.

    Only what is tidied up depends on this lock. A saver that does not get it, because another one was stopped
    or the file system has none, goes on: two that replace the same config.json leave the first one's weights.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _LONGEST_WAIT
        while files.locked(descriptor) is False and time.monotonic() < end:
            time.sleep(random.uniform(0.001, 0.005))
        yield
    finally:
        os.close(descriptor)


def replace(
    draft: files.Draft,
    named: str | None,  # the weights that the present config.json names
) -> None:
    """Put a draft in the place of config.json, and remove the weights that the one before named."""
    folder = draft.path.parent
    old, mark = _marked(folder, named)
    if mark is not None:
        # Should this saver be killed, the old weights go next time, as if theirs had been.
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | files.FLAGS, 0o666))
    try:
        files.flushed(folder)  # the new weights outlast a power cut before their name does
        draft.become(folder / CONFIG)
    except BaseException:
        if mark is not None and draft.path.exists():
            mark.unlink(missing_ok=True)
        raise
    files.flushed(folder)
    if old is not None and mark is not None:
        old.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def _marked(folder: Path, named: str | None) -> tuple[Path, Path] | tuple[None, None]:
    """Return weights that go once nothing names them, and the draft that names them until they are gone."""
    mark = None if named is None else _draft_of(named)
    return (None, None) if named is None or mark is None else (folder / named, folder / mark)


def clear(
    folder: Path,
    named: Callable[[], str],  # what config.json names at this moment
) -> None:
    """Remove what killed savers left. What config.json does not name now, no saver that is gone will name."""
    for path, token in files.abandoned(folder / CONFIG):
        if weights_name(token) != named():
            (folder / weights_name(token)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
