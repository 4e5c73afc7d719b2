"""What compression changed, measured on the outputs of the model and of every replaced layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress import calibrate, rewrite
from lrcompress.measure.reached import check_runs
from lrcompress.types import LayerCheck, PlanError, Verification


def verify(
    model: nn.Module,
    small: nn.Module,
    inputs: Any,  # a tensor, a tuple of positional or any mapping of keyword arguments
) -> Verification:
    """Measure what compression changed on the given inputs, for the whole model and layer by layer.

    Each replaced layer is run on the inputs that the original layer saw, unless it became narrower too, or
    took in what is behind it: the error of folded layers is nan. Outputs are compared wherever they stand in
    nested containers, dataclasses and objects; what is the same infinity or nan in both makes no difference.
    Both models run in evaluation mode, on the same random numbers, and are left as they were.

    Raises:
        PlanError: the two models' outputs differ in names or shapes, or hold nothing that can be compared; or
            a layer of the original runs in the small model, or a factored one that the inputs reach does not.
    """
    opened = rewrite.inner_names(name for name, _ in small.named_modules())
    model = rewrite.with_opened(rewrite.with_linears(model), opened)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, rewrite.Dense)}
    pairs = {name: new for name, new in small.named_modules() if rewrite.is_factored(new) and name in modules}
    pairs = {name: new for name, new in pairs.items() if new.weight.shape == modules[name].weight.shape}
    squares: dict[str, list[float]] = {}  # of the layers that run

    def see(name: str, x: Tensor, y: Tensor) -> None:
        squares.setdefault(name, [0.0, 0.0])
        squares[name][0] += float((pairs[name](x).double() - y.double()).square().sum())
        squares[name][1] += float(y.double().square().sum())

    alone = {name: modules[name] for name, new in pairs.items() if not rewrite.folded_into(new)}
    with calibrate.observed(alone, see):
        before = _outputs(model, inputs)
    after = _outputs(small, inputs)
    difference = _differences(before, after)
    check_runs(model, small, inputs)
    first = next(iter(before))
    logits = before[first] if len(before) == 1 and before[first].ndim == 2 else None
    if logits is not None and logits.shape[1] > 1:
        agreement = float((logits.argmax(1) == after[first].argmax(1)).double().mean())
    else:
        agreement = None
    return Verification(
        samples=calibrate.samples_in(inputs),
        output_error=_ratio(*_squares(before, difference)),
        max_difference=max((float(d.abs().max()) for d in difference if d.numel()), default=0.0),
        agreement=agreement,
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
    for batch in batches:
        before, after = (_outputs(each, batch) for each in (model, small))
        found = _squares(before, _differences(before, after))
        change, size = change + found[0], size + found[1]
    return _ratio(change, size)


def _outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:  # by path
    """Run a model; return its outputs, as they were before its state came back."""
    with calibrate.inference(model, inputs):
        found = calibrate.plain_tensors(calibrate.run(model, inputs))
        return {path: tensor.clone() for path, tensor in found.items()}


def _differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[Tensor]:
    """Subtract outputs, in float64.

    Raises:
        PlanError: they differ in names or shapes, or hold nothing that can be compared.
    """
    shapes = [{path: tuple(y.shape) for path, y in each.items()} for each in (before, after)]
    if shapes[0] != shapes[1]:
        differing = next(p for p in {**shapes[0], **shapes[1]} if shapes[0].get(p) != shapes[1].get(p))
        raise PlanError(
            f"output {differing!r} must keep its shape {shapes[0].get(differing)}, "
            f"got {shapes[1].get(differing)}"
        )
    if not any(y.isfinite().any() for y in before.values()):
        raise PlanError(
            "the outputs hold no finite floating number to compare, "
            f"in {list(before) or 'no floating tensor'}: return logits or features as tensors"
        )
    pairs = [(y.double(), after[path].double()) for path, y in before.items()]
    return [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, b - a) for a, b in pairs]


def _squares(before: dict[str, Tensor], differences: list[Tensor]) -> tuple[float, float]:
    """Return the squares of the differences, and of what was finite before, summed."""
    change = sum(float(d.square().sum()) for d in differences)
    return change, sum(float(y[y.isfinite()].double().square().sum()) for y in before.values())


def _ratio(change: float, size: float) -> float:
    """Return sqrt(change / size); nan when the original is all zero and the change is not."""
    return (change / size) ** 0.5 if size else (0.0 if change == 0 else math.nan)
