"""What the fits behind removed channels lost, and what they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lrcompress import removal
from lrcompress.factorize import Shares
from lrcompress.nn import SelectInputs
from lrcompress.reconstruct.problem import Moments, consumers_of, layer_of
from lrcompress.types import Removal


def shares_of(
    model: nn.Module,
    small: nn.Module,  # the model without the channels, fitted
    removals: Sequence[Removal],
    moments: Moments,  # of the consumers, in the original network
) -> dict[str, Shares]:  # by the layers' names in the small model
    """Return the shares of the variance of each fitted layer's outputs, of those that stay."""
    found = {}
    cuts = removal.check_fits(model, removals)
    for name in consumers_of(item.coupling for item in removals):
        gone = cuts[name].gone
        wide = layer_of(model, name)
        own = f"{name}.layer" if isinstance(small.get_submodule(name), SelectInputs) else name
        weight = layer_of(small, own).weight.detach().double().cpu().flatten(1)
        rows = torch.tensor([i for i in range(len(wide.weight)) if i not in gone.get("rows", ())])
        area, columns = wide.weight[0, 0].numel(), gone.get("columns", ())
        kept = torch.tensor([j for j in range(wide.weight[0].numel()) if j // area not in columns])
        xx, yx, yy = moments[name].centred
        total = float(yy[rows].sum())
        given = float((weight @ xx[kept][:, kept] * weight).sum())
        lost = total + given - 2 * float((weight * yx[rows][:, kept]).sum())
        found[own] = Shares(max(0.0, lost) / total, given / total) if total > 0 else Shares()
    return found
