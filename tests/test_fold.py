"""A folded model is the same function without its batch norms, before and after everything else."""

import copy
import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompress as lrc
from lrcompress import rewrite
from lrcompress.measure import tuning

# Libraries sum a convolution from its bias on: a large one costs float32 digits that a sum from zero keeps,
# up to twice what the law allows a folded dense layer. So its outputs are held to the law with small shifts,
# its weights, exactly, and its outputs in float64 with large ones.
SMALL, LARGE = 0.2, 3.0


def settled(model: nn.Module, shift: float = SMALL) -> nn.Module:
    """Give batch norms statistics, gains and shifts unlike those of new ones; put it in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, shift)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias, 0, shift)
    return model.eval()


def factored(model: nn.Module) -> nn.Module:
    """Factor every layer with rank 2."""
    plan = lrc.plan(model, lrc.Budget(params=1.0))
    for entry in plan:
        plan = plan.edit(entry.layer.name, rank=2)
    return lrc.apply(model, plan)


@pytest.fixture
def assert_same(assert_as_accurate_as_torch):
    """Return a check of two models by the tolerance law; the first one's float64 twin is the truth."""

    def check(model, folded, x):
        with torch.no_grad():
            reference = copy.deepcopy(model).double()(x.double())
            assert_as_accurate_as_torch(folded(x), model(x), reference)

    return check


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


# (layer, batch norm, input shape)
DENSE = [
    (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False), (5, 6)),
    (nn.Conv1d(4, 8, 3, stride=2), nn.BatchNorm1d(8, eps=0.1), (2, 4, 9)),
    (nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), (2, 4, 9, 7)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), nn.SyncBatchNorm(8), (2, 4, 9, 7)),
    (nn.Conv3d(4, 8, (1, 2, 3)), nn.BatchNorm3d(8), (2, 4, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 5, 6)),
    (nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False), nn.BatchNorm3d(6), (1, 4, 3, 4, 5)),
]


@pytest.mark.parametrize("case", DENSE, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_norm_goes_into_a_dense_layer(case, dtype, assert_same):
    layer, norm, shape = copy.deepcopy(case)
    x = torch.randn(shape).to(dtype)
    model = settled(nn.Sequential(layer, norm, nn.ReLU())).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = lrc.fold(model, x)
    assert kinds(folded) == [type(layer).__name__, "Identity", "ReLU"]
    assert kinds(model) == [type(layer).__name__, type(norm).__name__, "ReLU"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in folded.state_dict().values()} == {dtype}
    assert not folded.training
    assert_same(model, folded, x)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_exact_but_for_one_rounding_of_the_weights(case, dtype):
    layer, norm, shape = copy.deepcopy(case)
    x = torch.randn(shape, dtype=torch.float64)
    model = settled(nn.Sequential(layer, norm), LARGE).to(dtype)
    wide = copy.deepcopy(model).double()
    folded, rounded = lrc.fold(wide, x), lrc.fold(model, x.to(dtype)).state_dict()
    with torch.no_grad():
        expected = wide(x)
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    exact = folded.state_dict()
    assert exact.keys() == rounded.keys() == {"0.weight", "0.bias"}
    for name, value in rounded.items():
        assert torch.equal(value, exact[name].to(dtype)), name


LOW_RANK = [
    (lambda **kw: lrc.nn.LowRankLinear(8, 6, 2, **kw), nn.BatchNorm1d(6), (5, 8)),
    (lambda **kw: lrc.nn.LowRankLinear(8, 6, 2, groups=4, bias=False, **kw), nn.BatchNorm1d(6), (5, 8)),
    (lambda **kw: lrc.nn.LowRankConv1d(8, 6, 3, 2, conv_groups=2, **kw), nn.BatchNorm1d(6), (2, 8, 7)),
    (
        lambda **kw: lrc.nn.LowRankConv2d(8, 6, 3, 2, groups=4, padding=1, **kw),
        nn.BatchNorm2d(6),
        (2, 8, 5, 6),
    ),
    *(
        (
            lambda s=s, **kw: lrc.nn.LowRankConv2d(8, 6, 3, 2, 2, scheme=s, conv_groups=2, bias=False, **kw),
            nn.BatchNorm2d(6, affine=s > 0),
            (2, 8, 7, 6),
        )
        for s in range(4)
    ),
    (lambda **kw: lrc.nn.LowRankConv3d(4, 6, 2, 3, groups=2, **kw), nn.BatchNorm3d(6), (1, 4, 3, 4, 3)),
]


@pytest.mark.parametrize("case", LOW_RANK, ids=[str(make()) for make, *_ in LOW_RANK])
@pytest.mark.parametrize("kernel", ["auto", "fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_activation_go_into_a_factored_layer(case, kernel, dtype, assert_same):
    make, norm, shape = case
    for activation in (nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), None):
        x = torch.randn(shape).to(dtype)
        model = nn.Sequential(make(kernel=kernel), copy.deepcopy(norm), *([activation] if activation else []))
        model = settled(model, LARGE).to(dtype)
        folded = lrc.fold(model, x)
        assert kinds(folded)[1:] == ["Identity"] * (len(model) - 1)
        assert folded[0].activation == (type(activation).__name__.lower() if activation else "none")
        assert model[0].activation == "none"
        assert (folded[0].kernel, folded[0].rank, folded[0].groups) == (
            kernel,
            model[0].rank,
            model[0].groups,
        )
        assert_same(model, folded, x)


class Block(nn.Module):
    """A residual block with modules for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.ra, self.rb = nn.SiLU(), nn.ReLU()
        self.head, self.nh, self.rh = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.rb(x + self.nb(self.b(self.ra(self.na(self.a(x))))))
        return self.fc(self.rh(self.nh(self.head(x.mean((2, 3))))))


@pytest.fixture
def block() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(4, 3, 8, 8)
    return settled(Block()), x


def test_in_a_residual_block_what_follows_the_sum_stays(block, assert_same):
    model, x = block
    small = factored(model)
    for given, left in ((small, {"rb"}), (model, {"ra", "rb", "rh"})):
        folded, found = lrc.fold(given, x), lrc.foldable(given, x)
        assert_same(given, folded, x)
        assert {item.name for item in found.left_alone} == left
        for name, module in folded.named_modules():
            was = given.get_submodule(name)
            gone = isinstance(was, nn.BatchNorm1d | nn.BatchNorm2d | nn.ReLU | nn.SiLU | nn.GELU)
            assert type(module) is (nn.Identity if gone and name not in left else type(was))
    assert str(lrc.foldable(small, x)).splitlines() == [
        "a: na and ra",
        "b: nb",
        "head: nh and rh",
        "left alone: rb (ReLU): what it reads is not the output of a layer",
    ]


def test_folding_twice_changes_nothing_more(block):
    model, x = block
    once = lrc.fold(factored(model), x)
    twice = lrc.fold(once, x)
    assert str(twice) == str(once)
    assert all(torch.equal(v, once.state_dict()[name]) for name, v in twice.state_dict().items())
    assert lrc.foldable(once, x).folds == ()


def test_layouts_and_gradients_stay(block):
    model, x = block
    small = factored(model).to(memory_format=torch.channels_last)
    small.a.U.requires_grad_(False)
    small.head.bias.requires_grad_(False)
    folded = lrc.fold(small, x)
    assert folded.b.V.is_contiguous(memory_format=torch.channels_last)
    assert not folded.b.V.is_contiguous()
    dense = lrc.fold(model.to(memory_format=torch.channels_last), x)
    assert dense.b.weight.is_contiguous(memory_format=torch.channels_last)
    up = settled(nn.Sequential(nn.ConvTranspose2d(8, 12, 3, groups=2), nn.BatchNorm2d(12)))
    up = lrc.fold(up.to(memory_format=torch.channels_last), torch.randn(2, 8, 5, 5))
    assert up[0].weight.is_contiguous(memory_format=torch.channels_last)
    grads = {name: p.requires_grad for name, p in folded.named_parameters()}
    assert {name for name, needed in grads.items() if not needed} == {"a.U", "a.bias", "head.bias"}


def test_inputs_may_be_keywords_or_a_tuple(block):
    model, x = block
    folds = lrc.foldable(model, x).folds
    assert lrc.foldable(model, (x,)).folds == lrc.foldable(model, {"x": x}).folds == folds


def with_clock(monkeypatch, best):
    """Let the clock say that one candidate is the fastest: 0 as given, then ways, composed, merged."""
    ways = {"fused": 1.0, "composed": 2.0, "merged": 3.0}
    monkeypatch.setattr(
        tuning,
        "seconds_of_layers",
        lambda model, variants, *_: {w: {n: [ways[w]] for n in names} for w, names in variants.items()},
    )
    monkeypatch.setattr(
        tuning, "seconds_of_models", lambda models, *_: {n: float(int(n) != best) for n in models}
    )


@pytest.mark.parametrize("best", range(7))
def test_tuned_before_or_after_it_is_the_same_function(monkeypatch, block, best, assert_same):
    model, x = block
    small = factored(model)
    with_clock(monkeypatch, best)
    first, _ = lrc.tune(lrc.fold(small, x), x)
    last = lrc.fold(lrc.tune(small, x)[0], x)
    for fast in (first, last):
        assert_same(small, fast, x)
        assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    merged = best in (3, 6)
    assert type(first.a) is (lrc.nn.LayersInRow if merged else lrc.nn.LowRankConv2d)
    assert type(last.a) is (nn.Conv2d if merged else lrc.nn.LowRankConv2d)
    assert type(last.ra) is (nn.SiLU if merged else nn.Identity)


def test_merged_and_unfused_it_keeps_its_activations(block, assert_same):
    model, x = block
    small = factored(model)
    for other in (lrc.merge, lrc.unfuse):
        plain = other(lrc.fold(small, x))
        assert [type(part) for part in plain.a][-1] is nn.SiLU
        assert not any(rewrite.is_factored(module) for module in plain.modules())
        assert_same(small, plain, x)


def test_a_folded_model_is_not_saved(block, tmp_path):
    model, x = block
    plan = lrc.plan(model, lrc.Budget(params=1.0)).edit("b", rank=2)
    small = lrc.apply(model, plan)
    folded = lrc.fold(small, x)
    for each in (folded, copy.deepcopy(folded), lrc.fold(folded, x)):
        with pytest.raises(
            lrc.PlanError, match=r"layer 'a' must be as `apply` left it, got one with na folded"
        ):
            lrc.save(each, plan, tmp_path)
    lrc.save(small, plan, tmp_path)
    again = lrc.fold(lrc.load(tmp_path, model), x)
    with torch.no_grad():
        assert torch.equal(again(x), folded(x))


def test_a_folded_architecture_can_be_compressed_and_saved(block, tmp_path):
    """What was folded before `apply` belongs to the original: load takes it as that."""
    model, x = block
    original = lrc.fold(model, x)
    plan = lrc.plan(original, lrc.Budget(params=1.0)).edit("b", rank=2)
    small = lrc.apply(original, plan)
    assert lrc.verify(original, small, x).layers[0].output_error > 0
    lrc.save(small, plan, tmp_path / "first")
    again = lrc.load(tmp_path / "first", original)
    lrc.save(again, plan, tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(lrc.load(tmp_path / "second", original)(x), small(x))


def test_verify_compares_what_can_be_compared(block):
    model, x = block
    small = factored(model)
    before, after = lrc.verify(model, small, x), lrc.verify(model, lrc.fold(small, x), x)
    assert after.output_error == pytest.approx(before.output_error, rel=1e-3)
    errors = {layer.name: layer.output_error for layer in after.layers}
    known = {name for name, error in errors.items() if error == error}
    assert known == {"stem", "fc"}  # the others took in what is behind them
    assert {layer.name for layer in before.layers} == errors.keys()


def test_compiled_it_is_one_graph(block):
    model, x = block
    folded = lrc.fold(factored(model), x).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), folded(x))


def test_exported_it_holds_library_calls_only(block):
    model, x = block
    folded = lrc.fold(factored(model), x)
    exported = torch.export.export(folded, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert "lrcompress" not in exported.graph_module.code
    assert "batch_norm" not in exported.graph_module.code
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x[:2]), folded(x[:2]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # in the exporter
def test_onnx_runtime_computes_the_same(block, tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install .[export] exports to ONNX")
    pytest.importorskip("onnxscript", reason="pip install .[export] exports to ONNX")
    runtime = pytest.importorskip("onnxruntime", reason="pip install .[export] runs the exported graph")
    model, x = block
    folded = lrc.fold(factored(model), x)
    torch.onnx.export(folded, (x,), dynamo=True, verbose=False).save(str(tmp_path / "net.onnx"))
    assert {node.domain for node in onnx.load(tmp_path / "net.onnx").graph.node} == {""}
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), folded(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [None, lrc.alds(), lrc.svd()], ids=["dense", "alds", "svd"])
def test_resnet20(recipe, assert_same):
    """All 19 batch norms go; the trained network where LRCOMPRESS_DATA has it."""
    path = Path(__file__).parents[1] / "examples" / "resnet20_cifar10.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x = torch.randn(4, 3, 32, 32)
    if "LRCOMPRESS_DATA" in os.environ:
        model = example.trained(Path(os.environ["LRCOMPRESS_DATA"]))
    else:
        model = settled(example.ResNet20())
    small = lrc.compress(model, lrc.Budget(params=0.5), recipe)[0] if recipe else model
    folded, found = lrc.fold(small, x), lrc.foldable(small, x)
    assert (len(found.folds), found.left_alone) == (19, ())
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert folded.state_dict().keys() < small.state_dict().keys() | {f"{f.layer}.bias" for f in found.folds}
    assert_same(small, folded, x)
