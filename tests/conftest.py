"""Shared by all tests: fixed seeds, the real data when it is at hand, and the tolerance law."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make zoo` write down what it found."""
    parser.addoption("--architectures-json", help="join the outcomes of test_architectures.py to this file")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder with CIFAR-10 and the trained ResNet20, or skip."""
    if "LRCOMPRESS_DATA" not in os.environ:
        pytest.skip("set LRCOMPRESS_DATA to the folder with CIFAR-10 and resnet20_cifar10.safetensors")
    return Path(os.environ["LRCOMPRESS_DATA"])


@pytest.fixture
def assert_as_accurate_as_torch() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return the tolerance law: max|ours - ref| <= 2 max|torch in the same dtype - ref| + eps max|ref|."""

    def check(ours: Tensor, same_in_torch: Tensor, reference: Tensor) -> None:
        assert ours.shape == reference.shape
        allowed = 2 * (same_in_torch.double() - reference).abs().max()
        allowed += torch.finfo(ours.dtype).eps * reference.abs().max()
        error = (ours.double() - reference).abs().max()
        assert error <= allowed, f"{error:.3e} > {allowed:.3e}"

    return check
