"""The kinds of layers: dense ones, and the factored ones that take their place."""

from __future__ import annotations

from torch import nn

from lrcompress.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear

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
