"""Statistics on disk: one safetensors file, whose metadata hold the counts and a checksum of everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompress import files
from lrcompress.files import tensors as safetensors
from lrcompress.types import FormatError, PlanError
from lrcompress.types.plain import from_plain, parsed, shown
from lrcompress.types.statistics import LayerStatistics

_FORMAT = "3"  # files before it have no checksum
_TEXTS = ("fingerprint", "batches", "unreached", "samples", "shares")


def save(
    path: Path,
    layers: Mapping[str, LayerStatistics],
    fingerprint: str,
    batches: int,
    unreached: tuple[str, ...],
) -> None:
    """Write the file, in the place of one that is there in one step."""
    tensors: dict[str, Tensor] = {}
    for name, known in layers.items():
        tensors[f"{name}/autocorrelation"] = known.autocorrelation
        tensors[f"{name}/mean"] = known.mean
        if known.gradient is not None:
            tensors[f"{name}/gradient"] = known.gradient
    about = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "batches": str(batches),
        "unreached": json.dumps(unreached),
        "samples": json.dumps({name: known.samples for name, known in layers.items()}),
        "shares": json.dumps({name: known.share for name, known in layers.items()}),
    }
    about["checksum"] = safetensors.checksum(tensors, about)
    with files.draft(path) as draft:
        safetensors.write(draft.file, tensors, about)
        draft.become(path)
        for left, _ in files.abandoned(path):
            left.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote: the fields of ``calibrate.Statistics``.

    Raises:
        FormatError: not such a file, or one that was damaged.
    """
    with files.opened(path) as file:
        try:
            described = safetensors.described(file)
            about = described.metadata
            if about.get("format") != _FORMAT:
                raise FormatError(
                    f"statistics must have format {_FORMAT}, got {shown(about.get('format'))}: collect again"
                )
            tensors, _ = described.values()
            checksum = about.pop("checksum", None)
            if checksum != safetensors.checksum(tensors, about):
                raise FormatError("the file was damaged: its checksum does not match")
            return _fields(tensors, about)
        except (FormatError, PlanError, OSError) as error:
            raise FormatError(f"{path}: not statistics that can be read: {error}") from None


def _fields(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, Any]:
    """Check types and shapes; right checksums do not make right values."""
    texts = {name: about.get(name) for name in _TEXTS}
    fingerprint = texts.pop("fingerprint")
    try:
        read = {name: parsed(text or "") for name, text in texts.items()}
    except ValueError as error:
        raise FormatError(f"metadata must be {_TEXTS}: {error}") from None
    samples, shares = read["samples"], read["shares"]
    if not isinstance(samples, dict) or not isinstance(shares, dict) or samples.keys() != shares.keys():
        raise FormatError(f"samples and shares must be of the same layers, got {shown(samples)}")
    parts = ("autocorrelation", "mean", "gradient")
    known = {f"{name}/{part}" for name in samples for part in parts}
    if fingerprint is None or not tensors.keys() <= known:
        raise FormatError(f"there must be a fingerprint and tensors of {shown(list(samples))} alone")
    return {
        "layers": {name: _layer(name, tensors, count, shares[name]) for name, count in samples.items()},
        "fingerprint": fingerprint,
        "batches": from_plain(int, read["batches"], "batches"),
        "unreached": from_plain(tuple[str, ...], read["unreached"], "unreached"),
    }


def _layer(name: str, tensors: Mapping[str, Tensor], samples: object, share: object) -> LayerStatistics:
    R, mean = (_finite(tensors, f"{name}/{part}") for part in ("autocorrelation", "mean"))
    gradient = _finite(tensors, f"{name}/gradient") if f"{name}/gradient" in tensors else None
    if mean.ndim != 2:
        raise FormatError(f"{name}/mean must be [conv_groups, d], got {list(mean.shape)}")
    count = from_plain(int, samples, f"samples of {name}")
    fraction = from_plain(float, share, f"share of {name}")
    if not fraction >= 0:
        raise FormatError(f"the share of {name} must be a number >= 0, got {shown(share)}")
    return LayerStatistics(R, mean, count, gradient, fraction)


def _finite(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None or tensor.dtype != torch.float64 or not tensor.isfinite().all():
        raise FormatError(f"{key} must be there, finite and float64")
    return tensor
