"""What was built, what is installed, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

REQUIRED = ("torch", "numpy", "safetensors", "typer", "rich")
OPTIONAL = ("scikit-learn", "pillow", "matplotlib", "cupy")


def examine() -> dict[str, Any]:
    """Look at this installation; the values are ready for JSON, ``None`` is what was not found.

    ``problems`` stop lrcompress from working, ``gpu`` lists what keeps it from using a GPU.
    """
    extension, extension_problem = _extension()
    devices, cuda_of_torch, torch_problem = _torch_devices()
    return {
        "lrcompress": _version("lrcompress"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "extension": extension,
        "torch_cuda": cuda_of_torch,
        "cuda_devices": devices,
        "problems": [problem for problem in (extension_problem, torch_problem) if problem],
        "gpu": _missing_for_gpu(extension, cuda_of_torch, devices),
    }


def facts(found: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Write the findings for people."""
    extension = found["extension"]
    built = "not found"
    if extension:
        cuda = f"CUDA {extension['nvcc']} for sm {', '.join(extension['cuda_archs'])}"
        openmp = "OpenMP" if extension["openmp"] else "no OpenMP"
        built = f"{cuda if extension['cuda'] else 'no CUDA'}, {openmp}, compiler {extension['compiler']}"
    devices = ", ".join(f"{device['name']} (sm {device['sm']})" for device in found["cuda_devices"])
    return (
        *((name, str(found[name] or "not installed")) for name in ("lrcompress", "python", "platform")),
        ("compiled extension", built),
        ("AMX for bfloat16", "found" if extension and extension["amx"] else "not found"),
        ("CUDA of torch", found["torch_cuda"] or "none: a CPU build"),
        ("CUDA devices", devices or "none"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        *(("problem", problem) for problem in found["problems"]),
        *(("for GPU use", missing) for missing in found["gpu"] or ["nothing is missing"]),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> tuple[dict[str, Any] | None, str]:
    try:
        info: dict[str, Any] = importlib.import_module("lrcompress._C").build_info()
    except ImportError as error:
        hint = "install the package with `pip install .`, or build in place with `make build`"
        return None, f"the compiled extension lrcompress._C cannot be imported ({error}): {hint}"
    return info, ""


def _torch_devices() -> tuple[list[dict[str, str]], str | None, str]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return [], None, f"torch cannot be imported ({error}): `pip install torch`"
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append({"name": torch.cuda.get_device_name(index), "sm": f"{major}{minor}"})
    return devices, torch.version.cuda, ""


def _missing_for_gpu(
    extension: dict[str, Any] | None,
    torch_cuda: str | None,
    devices: list[dict[str, str]],
) -> list[str]:
    missing = []
    if not torch_cuda:
        missing.append("torch is a CPU build: install one with CUDA")
    elif not devices:
        missing.append(
            "torch sees no CUDA device: check the driver with `nvidia-smi`, and CUDA_VISIBLE_DEVICES"
        )
    if not extension or not extension["cuda"]:
        missing.append(
            "the extension is built without CUDA: put nvcc on PATH or set CUDA_HOME, and install again"
        )
        return missing
    archs = extension["cuda_archs"]
    missing += [
        f"{device['name']} is sm {device['sm']}, the extension is built for {', '.join(archs)}: install again"
        for device in devices
        if not _runs_on(device["sm"], archs)
    ]
    return missing


def _runs_on(sm: str, archs: list[str]) -> bool:
    """Say if machine code of the device's major version fits, or the PTX of the last architecture."""
    same_major = any(arch[:-1] == sm[:-1] and int(arch) <= int(sm) for arch in archs)
    return same_major or int(archs[-1]) <= int(sm)
