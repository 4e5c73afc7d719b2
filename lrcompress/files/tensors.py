"""The safetensors format, read and written a piece at a time.

The package safetensors maps a file, so a model would change with a file that is overwritten, or holds it
twice; here each tensor has memory of its own, and the checksum is of exactly the bytes that end up there.
Files are the same to the byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lrcompress.types import FormatError
from lrcompress.types.plain import LONGEST_JSON, parsed, shown

# In the order in which tensors lie in a file: the widest first.
_TYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}
_METADATA = "__metadata__"
_PIECE = 1 << 20  # bytes that are copied or hashed at once
_LARGEST = 2**53  # entries of a tensor, those of empty axes left out
_AXES = 64  # that torch can index


def unstorable(name: str, tensor: Tensor) -> str | None:
    """Say why the format cannot hold a tensor; None where it can."""
    if name == _METADATA or not _is_text(name):
        return "the format cannot hold its name"
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return (
            f"it is a {type(tensor).__module__}.{type(tensor).__name__}, whose values are not its own memory"
        )
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        return f"it is {kind}, not dense"
    if tensor.dtype not in _NAMES:
        return f"it is of type {tensor.dtype}"
    return "it is on the meta device and holds no values" if tensor.is_meta else None


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],  # that the format can hold
    metadata: Mapping[str, str],
) -> str:
    """Write a file and return its sha256; tensors of other devices are fetched one by one."""
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LONGEST_JSON:
        raise FormatError(f"the names of {len(tensors)} tensors are too long for one file")
    digest = hashlib.sha256()
    for piece in (len(header).to_bytes(8, "little"), header):
        digest.update(piece)
        file.write(piece)
    for name in names:
        memory = _memory(tensors[name])
        for start in range(0, len(memory), _PIECE):
            piece = bytes(memory[start : start + _PIECE])  # one copy, whoever changes the tensor meanwhile
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a sha256 of names, types, shapes, values and metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _NAMES[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(_memory(tensor))
    return digest.hexdigest()


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, on the CPU and in order."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return _bytes_of(plain)


def _bytes_of(plain: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, to read or to write."""
    raw = torch.empty(0, dtype=torch.uint8, device="cpu")
    start = plain.storage_offset() * plain.element_size()
    raw.set_(plain.untyped_storage(), start, (plain.numel() * plain.element_size(),))  # type: ignore[call-overload]
    view: memoryview = raw.numpy().data
    return view


@dataclass(frozen=True)
class Described:
    """A file whose header was read and checked; its tensors are still to be read."""

    file: io.BufferedReader
    header: bytes  # its length included
    metadata: dict[str, str]
    tensors: dict[str, Tensor]  # on the meta device, in the order of the file

    def values(self, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], str]:
        """Read all tensors, each into memory of its own, and return them with the sha256 of the file.

        Raises:
            FormatError: the file ends early or goes on after the tensors.
        """
        digest = hashlib.sha256(self.header)
        found = {}
        self.file.seek(len(self.header))
        for name, like in self.tensors.items():
            tensor = torch.empty(like.shape, dtype=like.dtype, device="cpu")
            memory = _bytes_of(tensor)
            for start in range(0, len(memory), _PIECE):
                piece = memory[start : start + _PIECE]
                _read_into(self.file, piece)
                digest.update(piece)
            found[name] = tensor.to(device)
        if self.file.read(1):
            raise FormatError("the file goes on after its tensors")
        return found, digest.hexdigest()


def described(file: io.BufferedReader) -> Described:
    """Read and check the header of an open file.

    Raises:
        FormatError: it is no header, or not that of a file of this size.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = bytearray(8)
    _read_into(file, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, LONGEST_JSON):
        raise FormatError(f"a header of {length} bytes is too long for a file of {size}")
    header = bytearray(length)
    _read_into(file, memoryview(header))
    try:
        entries = parsed(bytes(header))
    except ValueError as error:
        raise FormatError(f"the header is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise FormatError(f"the header must be an object, got {shown(entries)}")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"metadata must be texts by name, got {shown(metadata)}")
    found = [(*_described(name, entry), name) for name, entry in entries.items()]
    found.sort(key=lambda each: each[:2])
    end = 0
    for start, stop, _, name in found:
        if start != end:
            raise FormatError(f"tensor {name!r} must begin at {end}, got {start}")
        end = stop
    if end != size - 8 - length:
        raise FormatError(f"the tensors must fill {size - 8 - length} bytes, got {end}")
    return Described(file, bytes(prefix + header), metadata, {name: like for _, _, like, name in found})


def _described(name: str, entry: Any) -> tuple[int, int, Tensor]:
    """Check what a header says of one tensor; return begin, end, and its like on the meta device."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r} must have dtype, shape and data_offsets, got {shown(entry)}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _TYPES.get(kind) if isinstance(kind, str) else None
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    known = all(type(number) is int and 0 <= number <= _LARGEST for number in numbers)
    if dtype is None or not known or len(offsets) != 2 or len(shape) > _AXES:
        raise FormatError(f"tensor {name!r} cannot be of {shown(entry)}")
    if math.prod(max(side, 1) for side in shape) > _LARGEST:  # that of an empty tensor bounds its strides
        raise FormatError(f"tensor {name!r} cannot have the shape {shown(shape)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"tensor {name!r} of {shown(entry)} must have other offsets")
    return begin, end, torch.empty(shape, dtype=dtype, device="meta")


def _read_into(file: io.BufferedReader, memory: memoryview) -> None:
    """Fill memory from a file."""
    filled = 0
    while filled < len(memory):
        try:
            count = file.readinto(memory[filled:])
        except OSError as error:  # of the disk or the network
            raise FormatError(f"the file cannot be read: {error.strerror}") from None
        if not count:
            raise FormatError("the file ends too early")
        filled += count
