"""Running a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import hooks
from torch.utils._pytree import tree_leaves

from lrcompress.types import PlanError

_AT_ONCE = 100  # samples in one forward


def run(
    model: nn.Module,
    inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
) -> Any:
    """Call the model."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def in_parts(inputs: Any) -> list[Any]:
    """Cut inputs into batches, when they are one tensor."""
    return list(inputs.split(_AT_ONCE)) if isinstance(inputs, Tensor) else [inputs]


def thinned(
    batches: Sequence[Any],
    share: int,  # one batch of so many
    least: int,  # samples that stay, if there are as many
) -> list[Any]:
    """Return evenly spaced batches."""
    samples = sum(samples_in(batch) for batch in batches)
    return list(batches[:: max(1, min(share, samples // least))])


def samples_in(inputs: Any) -> int:
    """Return the leading size of the first tensor.

    Raises:
        PlanError: there is no tensor with at least one sample.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf):
            return len(leaf)
    raise PlanError("inputs must hold a tensor whose first dimension, the samples, is not empty")


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, then put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def observed(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input, output)`` after each forward of the given modules."""
    handles: list[hooks.RemovableHandle] = []
    try:
        for name, module in modules.items():

            def hook(
                _: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor, name: str = name
            ) -> None:
                see(name, args[0] if args else next(iter(kwargs.values())), output)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
