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
