"""Factors lie in memory as the weights that they replace."""

import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import rewrite


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factors_lie_as_torch_lays_out_new_tensors(memory_format):
    """A kernel of 1 x 1 is contiguous in any format: torch goes by its strides."""
    parts = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Conv1d(8, 4, 3), nn.Linear(34, 12)
    model = nn.Sequential(*parts)
    model = model.to(memory_format=memory_format)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.6), lrc.svd()))
    assert [name for name, module in small.named_children() if rewrite.is_factored(module)] == [*"0134"]
    for factor in (part for module in small if rewrite.is_factored(module) for part in (module.U, module.V)):
        own = memory_format if factor.ndim == 4 else torch.contiguous_format
        assert factor.stride() == torch.empty_like(factor, memory_format=own).stride()


def test_factors_keep_the_memory_format():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    model[1] = model[1].to(memory_format=torch.contiguous_format)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=1.0)).edit("0", rank=2).edit("1", rank=2))
    assert [layer.V.is_contiguous() for layer in small] == [False, True]
    assert small[0].V.is_contiguous(memory_format=torch.channels_last)
