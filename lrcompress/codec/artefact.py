"""The artefact on disk: a folder with config.json and one safetensors file; docs/format.md has the rules."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrcompress import files
from lrcompress.codec import folder as folders
from lrcompress.codec.folder import CONFIG
from lrcompress.codec.states import State
from lrcompress.files import tensors as safetensors
from lrcompress.types import Fold, FormatError, Plan, PlanError, Tuning, WeightError
from lrcompress.types.plain import LONGEST_JSON, from_plain, parsed, shown, to_plain

Value = TypeVar("Value")

FORMAT = "lrcompress"
FORMAT_VERSION = 1

_FIELDS = {
    "format": str,
    "format_version": int,
    "weights": str,
    "sha256": str,
    "aliases": dict,
    "buffers": list,
    "plan": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Artefact:
    """What an artefact holds."""

    plan: Plan
    tensors: dict[str, Tensor]  # state dict keys, and the buffers that state dicts leave out
    aliases: dict[str, str]  # further names of a stored tensor -> the name it is stored under
    buffers: tuple[str, ...]  # names in `tensors` or `aliases` that are no keys of the state dict
    tunings: tuple[Tuning, ...] = ()  # one a device
    folds: tuple[Fold, ...] = ()  # made after the tensors are in their places
    states: tuple[State, ...] = ()  # their tensors are in `tensors` or `aliases`, too

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors under all their names."""
        return {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items()}}


@dataclass(frozen=True)
class Stored:
    """An artefact that is open: all of it is checked but the values, which are still to be read."""

    artefact: Artefact  # its tensors on the meta device
    path: Path  # of the weights
    sha256: str
    weights: safetensors.Described

    def values(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read the tensors, each once; what happens to the file afterwards does not change them.

        Raises:
            FormatError: the file is not the one that config.json describes.
        """
        try:
            tensors, found = self.weights.values(device)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        if found != self.sha256:
            raise FormatError(f"{self.path} must have sha256 {self.sha256}, got {found}")
        return tensors


def write(path: str | Path, artefact: Artefact, versions: Mapping[str, str]) -> None:
    """Write the folder, replacing an artefact of ours that is there already in one step.

    Raises:
        FormatError: the folder holds a model that is not ours, or the plan is too large; nothing was written.
        PlanError: the plan's numbers do not fit together; nothing was written.
        OSError: the folder cannot be written; what was there before is still whole.
    """
    folder = Path(path)
    _check_own(folder)
    Plan.from_json(artefact.plan.to_json())  # what is written can be read
    if len(_config_text(artefact, versions, folders.weights_name("0" * 16), "0" * 64)) > LONGEST_JSON:
        raise FormatError(f"the plan is too large: {CONFIG} must have at most {LONGEST_JSON} bytes")
    folder.mkdir(parents=True, exist_ok=True)
    with files.draft(folder / CONFIG) as draft:
        name = folders.weights_name(draft.token)
        try:
            with (folder / name).open("xb") as file:
                digest = safetensors.write(file, artefact.tensors, {"format": "pt"})
                file.flush()
                os.fsync(file.fileno())
            draft.file.write(_config_text(artefact, versions, name, digest))
            with folders.publishing(folder):
                present = _read_config(folder)["weights"] if os.path.lexists(folder / CONFIG) else None
                folders.replace(draft, present)
                folders.clear(folder, lambda: str(_read_config(folder)["weights"]))
        except BaseException:
            if draft.path.exists():  # not published
                (folder / name).unlink(missing_ok=True)
            raise


def _config_text(artefact: Artefact, versions: Mapping[str, str], weights: str, digest: str) -> bytes:
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "sha256": digest,
        "aliases": artefact.aliases,
        "buffers": list(artefact.buffers),
        "plan": json.loads(artefact.plan.to_json()),
        "versions": dict(versions),
        "tunings": [tuning.to_dict() for tuning in artefact.tunings],
        "folds": [to_plain(fold) for fold in artefact.folds],
        "states": [to_plain(state) for state in artefact.states],
    }
    config["checksum"] = _checksum(config)
    return json.dumps(config, allow_nan=False).encode()


def _check_own(folder: Path) -> None:
    """Refuse a folder with a model that is not ours."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise FormatError(f"{folder} must be a folder")
    strangers = folders.foreign_weights(folder)
    if os.path.lexists(folder / CONFIG):
        try:
            _read_config(folder)
        except FormatError as error:
            raise FormatError(f"nothing was saved, choose another folder: {error}") from None
    elif strangers:
        raise FormatError(f"nothing was saved, choose another folder: {folder} holds weights, {strangers}")


@contextmanager
def reading(path: str | Path) -> Iterator[Stored]:
    """Open an artefact after checking all of it but the values.

    Raises:
        FormatError: a file is missing, damaged, changed by hand, or of another format or version.
    """
    folder = Path(path)
    config = _read_config(folder)
    while True:
        try:
            file = files.opened(folder / str(config["weights"]))
            break
        except FormatError:
            before, config = config, _read_config(folder)
            if config == before:  # else an artefact took the place of the one that was read
                raise
    with file:
        yield _stored(folder, config, file)


def _stored(folder: Path, config: dict[str, Any], file: Any) -> Stored:
    """Check the header of the weights, and config.json against it."""
    where = folder / config["weights"]
    try:
        weights = safetensors.described(file)
    except FormatError as error:
        raise FormatError(f"{where} is no safetensors file that belongs to {CONFIG}: {error}") from None
    tensors, aliases, buffers = weights.tensors, config["aliases"], config["buffers"]
    states = _optional(folder, config, "states", State.from_plain)
    dangling = [name for name, target in aliases.items() if target not in tensors or name in tensors]
    unknown = [
        name
        for name in (*buffers, *(n for s in states for n in s.names()))
        if name not in tensors and name not in aliases
    ]
    if dangling or unknown:
        raise FormatError(f"{folder / CONFIG} names tensors that are not stored: {dangling + unknown}")
    artefact = Artefact(
        _plan(folder, config),
        tensors,
        aliases,
        tuple(buffers),
        _optional(folder, config, "tunings", Tuning.from_dict),
        _optional(folder, config, "folds", lambda plain: from_plain(Fold, plain, "fold")),
        states,
    )
    return Stored(artefact, where, config["sha256"], weights)


def read_plan(path: str | Path) -> Plan:
    """Read only the plan of an artefact.

    Raises:
        FormatError: config.json is missing, damaged, or not ours.
    """
    return _plan(Path(path), _read_config(Path(path)))


def _plan(folder: Path, config: dict[str, Any]) -> Plan:
    try:
        return Plan.from_fields(config["plan"])
    except PlanError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None


def _optional(
    folder: Path, config: dict[str, Any], name: str, read: Callable[[Any], Value]
) -> tuple[Value, ...]:
    """Read a list of values that need not be there."""
    found = config.get(name, [])
    if not isinstance(found, list):
        raise FormatError(f"{folder / CONFIG}: {name} must be a list, got {shown(found)}")
    try:
        return tuple(read(plain) for plain in found)
    except PlanError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json and check its fields and checksum."""
    where = folder / CONFIG
    try:
        config = parsed(files.text_of(where, LONGEST_JSON))
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{where} is not an artefact of {FORMAT}")
    found = config.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(f"{where}: format_version must be {FORMAT_VERSION}, got {shown(found)}")
    if config.pop("checksum", None) != _checksum(config):
        raise FormatError(f"{where} was changed after it was written: its checksum does not match")
    for name, kind in _FIELDS.items():
        if not isinstance(config.get(name), kind):
            raise FormatError(f"{where}: {name} must be a {kind.__name__}, got {shown(config.get(name))}")
    if not all(isinstance(name, str) for name in [*config["aliases"].values(), *config["buffers"]]):
        raise FormatError(f"{where}: aliases and buffers must hold names only")
    if Path(config["weights"]).name != config["weights"]:
        raise FormatError(f"{where}: weights must be a file in the same folder, got {config['weights']!r}")
    return config


def _checksum(config: Mapping[str, Any]) -> str:
    """Hash the canonical text of everything but the checksum itself."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def storable(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split tensors into those to store and the aliases of tensors that share their memory exactly.

    Raises:
        WeightError: the format cannot hold a tensor; the message names it.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in named.items():
        reason = safetensors.unstorable(name, tensor)
        if reason is not None:
            raise WeightError(f"tensor {name!r} cannot be saved: {reason}")
        bits = (tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, bits)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    return stored, aliases
