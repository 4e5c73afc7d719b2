"""A linear layer as the product of two."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress import ops
from lrcompress.nn.choices import Activation, Kernel, check_choices, choices_repr, is_traced, takes_fused
from lrcompress.nn.weight import check_new_weight, decoders, take_decoder, weight_of
from lrcompress.ops._activations import activate
from lrcompress.ops.lowrank_linear import chooses_rows, kernel_pays, takes_many_rows

# Weights, and multiplications in all rows, from which bench/lowrank_linear.py has the op ahead of two calls.
_LEAST = {torch.float32: (1 << 19, 1 << 20), torch.bfloat16: (0, 1 << 19)}


class LowRankLinear(nn.Module):
    """Apply ``y = U V x + b`` with V block-diagonal over ``groups`` equal slices of the input features.

    U is [out_features, groups rank], V is [groups rank, in_features / groups]. Full rank is
    ``min(out_features, in_features / groups)``. A drop-in for ``nn.Linear``. ``activation`` comes behind the
    bias. ``kernel`` says what runs in inference: "fused" ``ops.lowrank_linear`` where it has a
    kernel for so many rows, "auto" the same on the CPU alone, for few rows and not for the smallest
    products, whose time is mostly the call's, "composed" two products.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "none",
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_choices(activation, kernel)
        self.activation, self.kernel = activation, kernel
        if groups < 1 or in_features % groups:
            raise ValueError(f"groups must divide in_features={in_features}, got {groups}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.groups = rank, groups
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(out_features, groups * rank, **made))
        self.V = nn.Parameter(torch.empty(groups * rank, in_features // groups, **made))
        self.bias = nn.Parameter(torch.empty(out_features, **made)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors so that the outputs vary as those of a new ``nn.Linear`` do."""
        nn.init.kaiming_uniform_(self.V, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.U, nonlinearity="linear")
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.in_features, 1))
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:  # [out_features, in_features]
        """What the factors multiply out to, for code that reads the weight of any layer."""
        return weight_of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new weight goes to the factors."""
        if name == "weight":
            self.take_weight(value)
        else:
            super().__setattr__(name, value)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (self.out_features, self.in_features)

    def factors(self) -> tuple[Tensor, ...]:
        """Return U and V."""
        return self.U, self.V

    def take_weight(self, weight: Tensor) -> None:
        """Change U so that the factors multiply out to a weight.

        Raises:
            WeightError: there is no such U, or an activation was folded in.
        """
        check_new_weight(self, weight)
        blocks = weight.detach().unflatten(1, (self.groups, -1)).transpose(0, 1)
        U = decoders(self, blocks, self.V.detach().unflatten(0, (self.groups, self.rank)))
        take_decoder(self, U.transpose(0, 1).flatten(1), weight)

    def run_factors(self, input: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor | None:
        """Apply the factors and a bias, without the layer's own bias and activation."""
        return None if geometry else F.linear(self._encoded(input), self.U, bias)

    def multiplied_out(self) -> Tensor:  # [out_features, in_features]
        """Return the product of the factors."""
        return self.product(self.U, self.V)

    def product(self, U: Tensor, V: Tensor) -> Tensor:  # [out_features, in_features]
        """Return what factors shaped as those of the layer multiply out to."""
        split = (self.groups, self.rank)
        return torch.einsum("okj,kjn->okn", U.unflatten(1, split), V.unflatten(0, split)).flatten(1)

    def forward(
        self,
        input: Tensor,  # [..., in_features]
    ) -> Tensor:  # [..., out_features]
        """Apply the layer."""
        if self.runs_fused(input):
            return ops.lowrank_linear(input, self.U, self.V, self.bias, self.groups, self.activation)
        return activate(F.linear(self._encoded(input), self.U, self.bias), self.activation)

    def _encoded(self, input: Tensor) -> Tensor:  # [..., groups rank]
        if self.groups == 1:
            return F.linear(input, self.V)
        slices = input.reshape(-1, self.groups, self.in_features // self.groups).transpose(0, 1)
        z = torch.bmm(slices, self.V.unflatten(0, (self.groups, self.rank)).mT)
        return z.transpose(0, 1).reshape(input.shape[:-1] + (self.groups * self.rank,))  # noqa: RUF005 (torch.fx)

    def runs_fused(self, input: Tensor) -> bool:
        """Say whether a kernel of ``ops.lowrank_linear`` runs this call: unless composed, if it has one."""
        if is_traced(input):
            return False
        if torch.compiler.is_compiling():
            return self._compiles_fused(input)
        rows = input.numel() // max(self.in_features, 1)
        if type(rows) is not int:  # a trace's: a graph must not hold a choice that one number of rows made
            return False
        if self.kernel == "auto":  # first, for it is the least that a small layer is kept waiting
            weights = self.U.numel() + self.V.numel()
            least, work = _LEAST.get(input.dtype, (0, 0))
            if weights < least or rows * weights < work:
                return False
        if self.kernel == "composed" or not takes_fused(self.kernel, input, self.U, self.V, self.bias):
            return False
        if kernel_pays(input, self.groups * self.rank, rows):
            return True
        return self.kernel == "fused" and takes_many_rows(input, self.rank, rows, self.groups)

    def _compiles_fused(self, input: Tensor) -> bool:
        """Say whether a compiled graph holds the op, which looks at the number of rows in each call."""
        if not takes_fused(self.kernel, input, self.U, self.V, self.bias):
            return False
        least = _LEAST.get(input.dtype, (0, 0))[0]
        pays = self.U.numel() + self.V.numel() >= least and chooses_rows(input)
        return self.kernel == "fused" or (self.kernel == "auto" and pays)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        ) + choices_repr(self.activation, self.kernel)
