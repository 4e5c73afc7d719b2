"""Samples from files, as inputs of a model: tensors, arrays, folders of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrcompress.types import CompressionError

BATCH = 100  # samples in one batch
ARRAYS = (".safetensors", ".npz", ".npy")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")

Samples = Tensor | dict[str, Tensor]  # one input, or inputs by the names of the model's arguments


@dataclass(frozen=True)
class Pictures:
    """How images become tensors: grey where ``mean`` has one number, else RGB."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet, as most pretrained networks expect
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: int | None = None  # of the square cut from the middle once the shorter side has it; None: as it is

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise CompressionError(
                f"mean and std must be 1 or 3 numbers each, std positive, got {self.mean} and {self.std}"
            )


def read(
    path: Path,  # a file of tensors or arrays, or a folder of images
    most: int | None,  # samples, evenly spaced; None: all
    pictures: Pictures,
    dtype: torch.dtype,  # of floating-point inputs
) -> Samples:
    """Read samples; one tensor is the input, several are inputs by name, with the samples in front.

    Arrays of 8-bit numbers with three axes or more are images, [samples, height, width(, channels)] or
    [samples, channels, height, width].

    Raises:
        CompressionError: nothing in it can be read as samples, or tensors hold different numbers of them.
    """
    if path.is_dir():
        return _images(path, most, pictures).to(dtype)
    if path.suffix not in ARRAYS:
        raise CompressionError(f"{path} must be a folder of images or one of {', '.join(ARRAYS)}")
    tensors = {name: _as_input(tensor, pictures, dtype) for name, tensor in _tensors(path).items()}
    counts = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise CompressionError(f"{path} must hold tensors with equally many samples in front, got {counts}")
    chosen = _spaced(next(iter(counts.values())), most)
    if len(tensors) == 1:
        return next(iter(tensors.values()))[chosen]
    return {name: tensor[chosen] for name, tensor in tensors.items()}


def in_batches(samples: Samples) -> list[Any]:
    """Cut samples into batches."""
    if isinstance(samples, Tensor):
        return list(samples.split(BATCH))
    parts = {name: tensor.split(BATCH) for name, tensor in samples.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]


def moved(samples: Samples, device: str) -> Samples:
    """Return samples on a device."""
    if isinstance(samples, Tensor):
        return samples.to(device)
    return {name: tensor.to(device) for name, tensor in samples.items()}


def _spaced(count: int, most: int | None) -> Tensor:
    """Return the indices of at most so many evenly spaced samples."""
    if most is None or count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"input": found} if isinstance(found, np.ndarray) else dict(found)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except (ValueError, TypeError, EOFError) as error:  # TypeError: numbers that torch does not have
        raise CompressionError(f"{path} cannot be read as arrays: {error}") from None


def _as_input(tensor: Tensor, pictures: Pictures, dtype: torch.dtype) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(dtype)
    if tensor.dtype != torch.uint8 or tensor.ndim < 3:
        return tensor
    channels = len(pictures.mean)
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.shape[1] != channels:
        tensor = tensor.movedim(-1, 1)
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise CompressionError(
            f"images of {channels} channels, as --mean has, must be [samples, height, width, {channels}] or "
            f"[samples, {channels}, height, width], got {list(tensor.shape)}"
        )
    return _normalised(tensor, pictures).to(dtype)


def _normalised(
    images: Tensor,  # [samples, channels, height, width], 0 to 255
    pictures: Pictures,
) -> Tensor:
    mean, std = (torch.tensor(part)[:, None, None] for part in (pictures.mean, pictures.std))
    return (images.float() / 255 - mean) / std


def _images(folder: Path, most: int | None, pictures: Pictures) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise CompressionError("reading images needs Pillow: pip install pillow") from None
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise CompressionError(f"{folder} holds no images ({', '.join(IMAGES)})")
    read = []
    for i in _spaced(len(files), most).tolist():
        try:
            with Image.open(files[i]) as image:
                pixels = image.convert("L" if len(pictures.mean) == 1 else "RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CompressionError(f"{files[i]} cannot be read as an image: {error}") from None
        if pictures.size is not None:
            pixels = ImageOps.fit(pixels, (pictures.size, pictures.size), Image.Resampling.BILINEAR)
        array = np.asarray(pixels)
        read.append(torch.tensor(array[..., None] if array.ndim == 2 else array).movedim(-1, 0))
        if read[-1].shape != read[0].shape:
            sizes = f"{list(read[0].shape[1:])} and {list(read[-1].shape[1:])}"
            raise CompressionError(f"{folder} holds images of {sizes} pixels: give --image-size")
    return _normalised(torch.stack(read), pictures)
