"""The layer on the fused convolution: what it keeps of its factors, and when it takes the kernel."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import ops
from lrcompress.ops import _processor


def changes():
    """Name ways in which a layer's factors change, or where they lie."""

    def write(layer):
        layer.V.data[0, 0, 0, 0] += 1.0

    def write_last(layer):
        layer.U.data[-1, -1] -= 1.0

    def bias(layer):
        layer.bias.data[2] = 7.0

    def replace(layer):
        layer.V = nn.Parameter(layer.V.detach() * 2.0, requires_grad=False)

    def load(layer):
        layer.load_state_dict({name: value + 0.5 for name, value in layer.state_dict().items()})

    def lay_out(layer):
        layer.to(memory_format=torch.channels_last)

    def convert(layer):
        layer.bfloat16()

    return [write, write_last, bias, replace, load, lay_out, convert]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("sizes", [(4, 5, 3), (40, 48, 2)], ids=["direct", "winograd"])
def test_what_is_kept_of_the_factors_never_goes_stale(layout, change, sizes):
    inside, rank, groups = sizes
    layer = lrc.nn.LowRankConv2d(inside * groups, 9, 3, rank, groups, padding=1, kernel="fused")
    layer.requires_grad_(False)
    x = torch.randn(2, inside * groups, 9, 8).to(memory_format=layout)
    for _ in range(2):
        layer(x)
    change(layer)
    x = x.to(layer.U.dtype)

    def fresh(x):
        return ops.lowrank_conv2d(x, layer.U, layer.V.contiguous(), layer.bias, padding=(1, 1), groups=groups)

    for same in (x, x, x[:, :, 1:, 2:], x):  # another size of image is another layout of the factors
        assert torch.equal(layer(same), fresh(same))


def test_what_is_kept_of_the_factors_is_no_part_of_copies():
    layer = lrc.nn.LowRankConv2d(4, 4, 3, 2, kernel="fused").requires_grad_(False)
    x = torch.randn(1, 4, 6, 6)
    expected = layer(x)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for again in (copy.copy(layer), copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert again.state_dict().keys() == {"U", "V", "bias"}
        assert torch.equal(again(x), expected)
    other = copy.deepcopy(layer)
    other.V *= 2.0
    assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


def test_threads_share_what_is_kept_of_the_factors():
    layer = lrc.nn.LowRankConv2d(8, 8, 3, 2, 2, padding=1, kernel="fused").requires_grad_(False)
    images = [torch.randn(1, 8, 5 + i % 3, 6) for i in range(24)]  # each size is packed anew
    expected = [layer(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for found, y in zip(pool.map(layer, images * 8), expected * 8, strict=True):
            assert torch.equal(found, y)


def test_a_layer_uses_it_where_it_should():
    x = torch.randn(2, 8, 10, 9)
    layer = lrc.nn.LowRankConv2d(8, 6, 3, rank=2, groups=4, padding=1, stride=2)
    expected = layer(x)
    assert not layer.runs_fused(x)  # gradients are recorded
    with torch.no_grad():
        assert layer.runs_fused(x)
        torch.testing.assert_close(layer(x), expected)
        assert not layer.runs_fused(x[0])
        assert not layer.runs_fused(x.double())
        assert not layer.to("meta").runs_fused(x)
        with torch.autocast("cpu"):
            assert not layer.to_empty(device="cpu").runs_fused(x)
        for other in (
            {"scheme": 1},
            {"conv_groups": 2},
            {"padding_mode": "circular", "padding": 1},
            {"kernel_size": 4, "padding": "same"},
            {"kernel_size": 1},
        ):
            given = {"kernel_size": 3, "rank": 1, "groups": 2, **other}
            assert not lrc.nn.LowRankConv2d(8, 6, **given).runs_fused(x), other


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"channels": 32, "rank": 2, "stride": 2}, True),
        ({"channels": 33, "rank": 2}, False),  # too large for direct sums, too low a rank for Winograd's
        ({"channels": 33, "rank": 8}, True),
        ({"channels": 33, "rank": 8, "stride": (1, 2)}, False),
        ({"channels": 33, "rank": 8, "dilation": 2}, False),
        ({"channels": 33, "rank": 8, "kernel_size": (3, 2)}, False),
        ({"channels": 256, "rank": 8}, True),
        ({"channels": 257, "rank": 8}, False),
        ({"channels": 514, "rank": 8, "groups": 2}, False),
        ({"channels": 64, "rank": 64, "filters": 1024}, True),
        ({"channels": 64, "rank": 64, "filters": 1025}, False),
        ({"channels": 32, "rank": 16, "filters": 1025, "stride": 2}, False),
    ],
    ids=str,
)
def test_a_layer_chooses_it_by_sizes(given, wanted):
    sizes = {"filters": 128, "kernel_size": 3, **given}
    channels, filters = sizes.pop("channels"), sizes.pop("filters")
    layer = lrc.nn.LowRankConv2d(channels, filters, **sizes)
    with torch.no_grad():
        assert layer.runs_fused(torch.randn(1, channels, 8, 8)) == wanted


def test_a_compiled_layer_contains_it_and_an_exported_one_does_not():
    layer = lrc.nn.LowRankConv2d(8, 6, 3, rank=2, groups=4, padding=1).eval().requires_grad_(False)
    x = torch.randn(2, 8, 10, 9)
    expected = layer(x)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert "lowrank_conv2d" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x[:1]), layer(x[:1]))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("native", [False, True])
def test_many_pixels_in_bfloat16_are_the_librarys_where_it_has_instructions_for_them(native, monkeypatch):
    monkeypatch.setattr(_processor, "NATIVE_BFLOAT16", native)

    def runs(groups, rank, batch, dtype=torch.bfloat16, kernel="auto"):
        layer = lrc.nn.LowRankConv2d(32, 32, 3, rank, groups, padding=1, dtype=dtype, kernel=kernel)
        return layer.requires_grad_(False).runs_fused(torch.empty(batch, 32, 16, 16, dtype=dtype))

    assert runs(8, 7, 8)  # as many pixels as the limit
    assert runs(8, 7, 9) != native
    assert runs(4, 8, 9) != native
    assert runs(8, 7, 9, torch.float32)
    assert runs(8, 7, 9, kernel="fused")
    assert runs(16, 7, 9)
