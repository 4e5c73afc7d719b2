"""Saving and loading: bit-exact round trips, and what is refused because it is another model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc

CONFIG = "config.json"


class Net(nn.Module):
    """Buffers of both kinds, tied weights and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 12)
        self.head = nn.Linear(12, 9, bias=False)
        self.embedding = nn.Embedding(9, 12)
        self.head.weight = self.embedding.weight
        self.hidden.requires_grad_(False)
        self.register_buffer("scale", torch.full((12,), 2.0))
        self.register_buffer("shift", torch.arange(12.0), persistent=False)
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.norm(self.conv(x)).flatten(1))
        return self.head(h * self.scale + self.shift * self.steps)


def compressed(model: nn.Module) -> tuple[nn.Module, lrc.Plan]:
    return lrc.compress(model, lrc.Budget(params=0.25))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, nn.Module, Path]:
    """Return an original, its compressed copy and the folder that holds it."""
    model = Net().eval()
    small, plan = compressed(model)
    lrc.save(small, plan, tmp_path / "out")
    return model, small, tmp_path / "out"


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict()) | dict(model.named_buffers())


def assert_same(one: nn.Module, two: nn.Module) -> None:
    left, right = all_tensors(one), all_tensors(two)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor, right[name]), name
    flags = [{n: p.requires_grad for n, p in m.named_parameters(remove_duplicate=False)} for m in (one, two)]
    assert flags[0] == flags[1]
    assert [(n, type(m)) for n, m in one.named_modules()] == [(n, type(m)) for n, m in two.named_modules()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fresh", ["same", "new", "meta"])
def test_a_round_trip_is_exact(tmp_path, dtype, fresh):
    model = Net().to(dtype).eval()
    for buffer in (model.norm.running_mean, model.norm.running_var, model.shift):
        buffer.add_(torch.rand_like(buffer))
    small, plan = compressed(model)
    lrc.save(small, plan, tmp_path)
    torch.manual_seed(1)
    with torch.device("meta" if fresh == "meta" else "cpu"):
        instance = model if fresh == "same" else Net().to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in all_tensors(instance).items()}
    loaded = lrc.load(tmp_path, instance)
    assert_same(loaded, small)
    assert loaded.head.weight is loaded.embedding.weight
    x = torch.randn(2, 4, 4, 4, dtype=dtype)
    assert torch.equal(loaded(x), small(x))
    assert lrc.load_plan(tmp_path) == plan
    after = all_tensors(instance)
    assert all(t.is_meta or torch.equal(t, after[name]) for name, t in before.items())
    assert {type(m) for m in instance.modules()} == {type(m) for m in Net().modules()}
    theirs = {p.data_ptr() for p in instance.parameters() if not p.is_meta}
    assert theirs.isdisjoint(p.data_ptr() for p in loaded.parameters())


def test_the_dtype_is_that_of_the_artefact(saved, tmp_path):
    model, small, _ = saved
    half = copy.deepcopy(small).half()
    lrc.save(half, compressed(model)[1], tmp_path / "half")
    assert_same(lrc.load(tmp_path / "half", model), half)


def test_a_fine_tuned_model_is_saved_as_it_is(saved):
    model, small, folder = saved
    small.train()
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], 0.1)
    small(torch.randn(4, 4, 4, 4)).square().mean().backward()
    optimizer.step()
    lrc.save(small, lrc.load_plan(folder), folder)
    loaded = lrc.load(folder, model)
    assert_same(loaded, small)
    assert not torch.equal(loaded.embedding.weight, model.embedding.weight)
    loaded(torch.randn(4, 4, 4, 4)).sum().backward()
    assert loaded.conv.U.grad is not None


def test_weights_tied_only_in_the_instance_stay_apart(saved):
    """What is tied is said by the artefact, not by the instance."""
    model, small, folder = saved
    small.head.weight = nn.Parameter(small.head.weight.detach() + 1)
    lrc.save(small, lrc.load_plan(folder), folder)
    loaded = lrc.load(folder, model)
    assert loaded.head.weight is not loaded.embedding.weight
    assert_same(loaded, small)


def test_a_buffer_that_shares_memory_with_a_parameter_stays_a_buffer(saved):
    model, small, folder = saved
    for net in (model, small):
        net.register_buffer("view", net.embedding.weight.detach())
    lrc.save(small, lrc.load_plan(folder), folder)
    loaded = lrc.load(folder, model)
    assert "view" in dict(loaded.named_buffers())
    assert "view" not in dict(loaded.named_parameters())
    assert not loaded.view.requires_grad
    assert_same(loaded, small)


class Versioned(nn.Module):
    """A module that refuses state dicts of unknown version, and keeps state that is no tensor."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 1}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_versions_and_extra_state_of_modules_are_kept(tmp_path):
    small, plan = lrc.compress(Versioned(), lrc.Budget(params=0.8))
    lrc.save(small, plan, tmp_path)
    loaded = lrc.load(tmp_path, Versioned())
    assert torch.equal(loaded.linear.U, small.linear.U)


def test_names_may_hold_any_character(tmp_path):
    model = nn.Sequential()
    for name in ("with space", "ümlaut", "a/b", "[0]*", '"', "lambda", "__metadata__"):
        model.add_module(name, nn.Linear(8, 8))
    small, plan = lrc.compress(model, lrc.Budget(params=0.8))
    lrc.save(small, plan, tmp_path)
    assert_same(lrc.load(tmp_path, model), small)


def test_a_model_of_one_layer(tmp_path):
    model = nn.Linear(12, 12)
    small, plan = lrc.compress(model, lrc.Budget(params=0.8))
    lrc.save(small, plan, tmp_path)
    assert_same(lrc.load(tmp_path, nn.Linear(12, 12)), small)


def test_a_model_that_is_not_what_the_plan_makes_is_not_saved(saved, tmp_path):
    model, small, folder = saved
    plan = lrc.load_plan(folder)
    wide = Net()
    wide.conv = nn.Conv2d(4, 16, 3)
    choice = plan["conv"].choice.config
    other = lrc.plan(wide, lrc.Budget(params=0.9)).edit("conv", groups=choice.groups, rank=choice.rank)
    missing = copy.deepcopy(small)
    missing.conv = nn.Identity()
    for wrong, made in (
        (model, plan),
        (small, plan.edit("conv", groups=2, rank=1)),
        (small, plan.keep_dense("conv")),
        (lrc.apply(wide, other), plan),
        (missing, plan),
    ):
        with pytest.raises(lrc.PlanError, match="layer 'conv'"):
            lrc.save(wrong, made, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_architecture_is_refused(saved):
    model, _, folder = saved
    other = copy.deepcopy(model)
    other.conv = nn.Conv2d(4, 16, 3)
    with pytest.raises(lrc.PlanError, match=r"'conv'.*\[8, 4, 3, 3\].*\[16, 4, 3, 3\]"):
        lrc.load(folder, other)
    changes = [("scale", torch.ones(3)), ("scale", torch.ones(12, dtype=torch.long)), ("more", torch.ones(1))]
    for name, buffer in changes:
        other = copy.deepcopy(model)
        other.register_buffer(name, buffer)
        with pytest.raises(lrc.FormatError, match=name):
            lrc.load(folder, other)
    other = copy.deepcopy(model)
    del other.shift
    other.register_buffer("shift", torch.arange(12.0), persistent=True)
    with pytest.raises(lrc.FormatError, match="shift"):
        lrc.load(folder, other)
