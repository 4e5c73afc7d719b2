"""What statistics of a network say of the network without some of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lrcompress import calibrate, rewrite
from lrcompress.nn import SelectInputs
from lrcompress.removal.narrow import Cut, check_fits
from lrcompress.types import Removal
from lrcompress.types.statistics import LayerStatistics


def narrowed(
    statistics: calibrate.Statistics,  # of the whole model
    small: nn.Module,  # the model without the channels
    model: nn.Module,
    removals: Sequence[Removal],
) -> calibrate.Statistics:
    """Return the moments of the inputs that stay, as the whole network gives them.

    The narrower network gives its layers the same only where nothing was lost; ``collect`` measures what it
    gives. Gradient statistics are left out.
    """
    cuts = check_fits(model, removals)
    found = {}
    for name, known in statistics.layers.items():
        selects = isinstance(small.get_submodule(name), SelectInputs)
        area = model.get_submodule(name).weight[0, 0].numel()  # type: ignore[index]
        found[f"{name}.layer" if selects else name] = _cut(known, cuts.get(name, Cut()), area)
    names = {*found, *statistics.unreached}
    layers = {n: m for n, m in small.named_modules() if n in names and isinstance(m, rewrite.Dense)}
    mark = calibrate.fingerprint(layers)
    return calibrate.Statistics(found, mark, statistics.batches, statistics.unreached)


def _cut(known: LayerStatistics, cut: Cut, area: int) -> LayerStatistics:
    """Return the moments of the columns and of the channel groups that stay."""
    groups, side = known.mean.shape
    channels, columns = cut.gone.get("channels", set()), cut.gone.get("columns", set())
    g = torch.tensor([i for i in range(groups) if i not in channels])
    c = torch.tensor([j for j in range(side) if j // area not in columns])
    R = known.autocorrelation[g][:, c][:, :, c]
    return LayerStatistics(R, known.mean[g][:, c], known.samples, share=known.share)
