"""The artefact on disk: a folder with config.json and one safetensors file. FORMAT.md states the rules.

config.json is replaced last and in one step, and names its weights file by the hash of the contents: at every
moment the folder holds the old artefact or the new one, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lrcompress.types import FormatError, Plan, PlanError, Tuning

FORMAT = "lrcompress"
FORMAT_VERSION = 1
CONFIG = "config.json"

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


def write(path: str | Path, artefact: Artefact, versions: Mapping[str, str]) -> None:
    """Write the folder, replacing an artefact that is there already in one step.

    Raises:
        OSError: the folder cannot be written; what was there before is still whole.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    payload = save_tensors(
        {k: v.contiguous() for k, v in artefact.tensors.items()}, metadata={"format": "pt"}
    )
    digest = hashlib.sha256(payload).hexdigest()
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "weights": f"model-{digest[:16]}.safetensors",
        "sha256": digest,
        "aliases": artefact.aliases,
        "buffers": list(artefact.buffers),
        "plan": json.loads(artefact.plan.to_json()),
        "versions": dict(versions),
        "tunings": [tuning.to_dict() for tuning in artefact.tunings],
    }
    config["checksum"] = _checksum(config)
    _replace(folder / str(config["weights"]), payload)
    _replace(folder / CONFIG, json.dumps(config).encode())
    for stale in folder.glob("model-*.safetensors"):
        if stale.name != config["weights"]:
            stale.unlink()


def read(path: str | Path) -> Artefact:
    """Read the folder back after checking all of it.

    Raises:
        FormatError: a file is missing, damaged, changed by hand, or of another format or version.
    """
    folder = Path(path)
    config = _read_config(folder)
    payload = _read_bytes(folder / str(config["weights"]))
    digest = hashlib.sha256(payload).hexdigest()
    if digest != config["sha256"]:
        raise FormatError(f"{folder / config['weights']} must have sha256 {config['sha256']}, got {digest}")
    try:
        tensors = load_tensors(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise FormatError(f"{folder / config['weights']} is no safetensors file: {error}") from None
    aliases, buffers = config["aliases"], config["buffers"]
    dangling = [name for name, target in aliases.items() if target not in tensors or name in tensors]
    unknown = [name for name in buffers if name not in tensors and name not in aliases]
    if dangling or unknown:
        raise FormatError(f"{folder / CONFIG} names tensors that are not stored: {dangling + unknown}")
    return Artefact(_plan(folder, config), tensors, aliases, tuple(buffers), _tunings(folder, config))


def read_plan(path: str | Path) -> Plan:
    """Read only the plan of an artefact.

    Raises:
        FormatError: config.json is missing, damaged, or not ours.
    """
    return _plan(Path(path), _read_config(Path(path)))


def _plan(folder: Path, config: dict[str, Any]) -> Plan:
    try:
        return Plan.from_json(json.dumps(config["plan"]))
    except PlanError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None


def _tunings(folder: Path, config: dict[str, Any]) -> tuple[Tuning, ...]:
    found = config.get("tunings", [])
    if not isinstance(found, list):
        raise FormatError(f"{folder / CONFIG}: tunings must be a list, got {found!r}")
    try:
        return tuple(Tuning.from_dict(plain) for plain in found)
    except PlanError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json and check its fields and checksum."""
    where = folder / CONFIG
    try:
        config = json.loads(_read_bytes(where))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{where} is not an artefact of {FORMAT}")
    found = config.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise FormatError(f"{where}: format_version must be {FORMAT_VERSION}, got {found!r}")
    if config.pop("checksum", None) != _checksum(config):
        raise FormatError(f"{where} was changed after it was written: its checksum does not match")
    for name, kind in _FIELDS.items():
        if not isinstance(config.get(name), kind):
            raise FormatError(f"{where}: {name} must be a {kind.__name__}, got {config.get(name)!r}")
    if not all(isinstance(name, str) for name in [*config["aliases"].values(), *config["buffers"]]):
        raise FormatError(f"{where}: aliases and buffers must hold names only")
    if Path(config["weights"]).name != config["weights"]:
        raise FormatError(f"{where}: weights must be a file in the same folder, got {config['weights']!r}")
    return config


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise FormatError(f"cannot read {str(path)!r}: {error}") from None


def _checksum(config: Mapping[str, Any]) -> str:
    """Hash the canonical text of everything but the checksum itself."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _replace(path: Path, payload: bytes) -> None:
    """Put a file in place whole: written beside, flushed to the disk, renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:  # with the permissions of any new file; those of mkstemp are 0600
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power cut, in their order."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storable(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split tensors into those to store and the aliases of tensors that share their memory exactly."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in named.items():
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor.detach().to("cpu", copy=False).clone(memory_format=torch.contiguous_format)
    return stored, aliases
