"""What compression changed, measured on the outputs of the model and of every replaced layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrcompress import calibrate, rewrite
from lrcompress.types import LayerCheck, PlanError, Verification


def verify(
    model: nn.Module,
    small: nn.Module,
    inputs: Any,  # a tensor, a tuple of positional or a mapping of keyword arguments
) -> Verification:
    """Measure what compression changed on the given inputs, for the whole model and layer by layer.

    Each replaced layer is run on the inputs that the original layer saw, unless it became narrower too, or
    took in what is behind it: the error of folded layers is nan. Both models run in evaluation mode and are
    left as they were.

    Raises:
        PlanError: the two models' outputs differ in number or shape.
    """
    model = rewrite.with_linears(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, rewrite.Dense)}
    pairs = {name: new for name, new in small.named_modules() if rewrite.is_factored(new) and name in modules}
    pairs = {name: new for name, new in pairs.items() if new.weight.shape == modules[name].weight.shape}
    squares: dict[str, list[float]] = {}  # of the layers that run

    def see(name: str, x: Tensor, y: Tensor) -> None:
        squares.setdefault(name, [0.0, 0.0])
        squares[name][0] += float((pairs[name](x).double() - y.double()).square().sum())
        squares[name][1] += float(y.double().square().sum())

    with calibrate.inference(model), calibrate.inference(small):
        alone = {name: modules[name] for name, new in pairs.items() if not rewrite.folded_into(new)}
        with calibrate.observed(alone, see):
            before = _outputs(calibrate.run(model, inputs))
        after = _outputs(calibrate.run(small, inputs))
    shapes = [[tuple(y.shape) for y in each] for each in (before, after)]
    if shapes[0] != shapes[1]:
        raise PlanError(f"outputs must keep their shapes {shapes[0]}, got {shapes[1]}")
    difference = [b.double() - a.double() for a, b in zip(before, after, strict=True)]
    logits = before[0] if len(before) == 1 and before[0].ndim == 2 and before[0].shape[1] > 1 else None
    return Verification(
        samples=calibrate.samples_in(inputs),
        output_error=_ratio(*_squares(before, after)),
        max_difference=max((float(d.abs().max()) for d in difference if d.numel()), default=0.0),
        agreement=None if logits is None else float((logits.argmax(1) == after[0].argmax(1)).double().mean()),
        params_before=rewrite.count_params(model),
        params_after=rewrite.count_params(small),
        macs_before=calibrate.count_macs(model, inputs),
        macs_after=calibrate.count_macs(small, inputs),
        layers=tuple(
            LayerCheck(
                name,
                type(modules[name]).__name__,
                rewrite.count_params(modules[name]),
                rewrite.count_params(pairs[name]),
                _ratio(*squares[name]) if name in squares else math.nan,
            )
            for name in pairs
        ),
    )


def output_error(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
) -> float:
    """Return ``sqrt(sum |y' - y|^2 / sum |y|^2)`` over all outputs y of the model and y' of the small one."""
    change = size = 0.0
    with calibrate.inference(model), calibrate.inference(small):
        for batch in batches:
            found = _squares(*(_outputs(calibrate.run(each, batch)) for each in (model, small)))
            change, size = change + found[0], size + found[1]
    return _ratio(change, size)


def _squares(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Return the squares of the differences, and of what was there before, summed."""
    pairs = list(zip(before, after, strict=True))
    change = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
    return change, sum(float(a.double().square().sum()) for a, _ in pairs)


def _outputs(outputs: Any) -> list[Tensor]:
    """Return the floating tensors among a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _ratio(change: float, size: float) -> float:
    """Return sqrt(change / size); nan when the original is all zero and the change is not."""
    return (change / size) ** 0.5 if size else (0.0 if change == 0 else math.nan)
