"""Whether a compressed model runs its own layers, and none of the original."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lrcompress import calibrate, rewrite
from lrcompress.types import PlanError


def check_runs(
    model: nn.Module,
    small: nn.Module,
    inputs: Any,  # a tensor, a tuple of positional or any mapping of keyword arguments
) -> None:
    """Check that each factored layer that the inputs reach runs, and nothing of the original does.

    What ran is told by the memory that operators read, so that methods that something keeps, and scripted
    code, are seen too. Layers that the inputs no longer reach since values changed, as behind a router, are
    looked for once more with the dense weights in the compressed model.

    Raises:
        PlanError: something keeps and runs a layer of the original; the message names the layer.
    """
    before, after = calibrate.reads(model, inputs), calibrate.reads(small, inputs)
    own = calibrate.memory_of((*small.parameters(), *small.buffers()))
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if after.any_of(tensor for tensor in tensors if not calibrate.memory_of([tensor]) <= own):
            raise PlanError(
                f"layer {name!r} of the original runs in the compressed model: something keeps it; make what "
                "runs it a module or a method"
            )
    dense = {name: module for name, module in model.named_modules() if isinstance(module, rewrite.Dense)}
    factored = {
        name: module for name, module in small.named_modules() if isinstance(module, rewrite.Factored)
    }
    missed = [
        name
        for name, new in factored.items()
        if name in dense
        and before.any_of([dense[name].weight])
        and not after.any_of(new.parameters(recurse=False))
    ]
    if not missed or not all(name in dense and _replaces(new, dense[name]) for name, new in factored.items()):
        return
    copies = {name: copy.deepcopy(dense[name]) for name in factored}
    again = calibrate.reads(rewrite.replaced(small, copies), inputs)
    for name in missed:
        if not again.any_of([copies[name].weight]):
            raise PlanError(
                f"layer {name!r} does not run in the compressed model: something else runs in its place; "
                "make that a module or a method, or ignore the layer"
            )


def _replaces(new: rewrite.Factored, old: rewrite.Dense) -> bool:
    """Say whether the dense layer could stand in the place of the factored one."""
    return new.weight.shape == old.weight.shape and not rewrite.folded_into(new)
