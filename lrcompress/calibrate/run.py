"""Running a model without leaving a trace on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import hooks

from lrcompress.calibrate.state import unchanged
from lrcompress.calibrate.values import rows_of


@contextmanager
def inference(
    model: nn.Module,
    *inputs: Any,  # which the model may write to
    fast_paths: bool = False,  # of attention in torch, which read weights without calling their modules
) -> Iterator[None]:
    """Run in evaluation mode without gradients, then put back whatever that changed, modes included.

    What is compiled by ``torch.compile`` runs as it was written, except where ``fast_paths`` are wanted.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(unchanged(model, *inputs))
        if not fast_paths and "torch._dynamo" in sys.modules:  # else nothing is compiled, and it loads slowly
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # no hook and no mode is compiled
        model.eval()
        try:
            torch.backends.mha.set_fastpath_enabled(enabled and fast_paths)
            with torch.no_grad():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def observed(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input, output)`` after each forward of the given modules; nested tensors as rows."""
    handles: list[hooks.RemovableHandle] = []
    try:
        for name, module in modules.items():

            def hook(
                _: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor, name: str = name
            ) -> None:
                given = args[0] if args else next(iter(kwargs.values()))
                see(name, rows_of(given), rows_of(output))

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
