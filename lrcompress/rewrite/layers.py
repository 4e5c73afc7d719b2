"""The kinds of layers: dense ones, and the factored ones that take their place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lrcompress.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from lrcompress.types import PlanError

Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Factored = LowRankLinear | LowRankConv1d | LowRankConv2d | LowRankConv3d

CONVOLUTIONS: dict[type[nn.Module], type[LowRankConv1d | LowRankConv2d | LowRankConv3d]] = {
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}
DENSE: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that says how a module computes: a parent in ``DENSE`` whose forward it keeps."""
    kind = type(module)
    base = next((base for base in DENSE if issubclass(kind, base)), None)
    if base is None or kind is base:
        return kind
    kept = all(
        getattr(kind, name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward", "__call__", "__getattr__")
    )
    own = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    plain = not own and not any(True for _ in module.buffers()) and not any(True for _ in module.children())
    return base if kept and plain else kind


def is_factored(module: nn.Module) -> bool:
    """Say whether a module is one of ours."""
    return isinstance(module, Factored)


def check_factored(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse names that are not those of factored layers.

    Raises:
        PlanError: there is such a name; the message lists the model's factored layers.
    """
    known = [name for name, module in model.named_modules() if is_factored(module)]
    for name in names:
        if name not in known:
            raise PlanError(f"layer {name!r} must be a factored layer; the model has {known}")
