"""Re-estimated statistics against averages taken by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompress as lrc

NORMS = [(nn.BatchNorm1d, (5,)), (nn.BatchNorm1d, ()), (nn.BatchNorm2d, (5, 4)), (nn.BatchNorm3d, (2, 3, 4))]


def batches_of(size: tuple[int, ...], sizes: tuple[int, ...] = (6, 3, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [3 * torch.randn(n, 4, *size, generator=generator) + n for n in sizes]


def averages(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Average the mean and the unbiased variance of each channel over the batches."""
    channels = [batch.transpose(0, 1).flatten(1).double() for batch in batches]
    means, variances = (torch.stack([getattr(c, name)(1) for c in channels]) for name in ("mean", "var"))
    return means.mean(0), variances.mean(0)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_untouched(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "size"), NORMS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_statistics_are_the_averages_over_batches(kind, size):
    model = nn.Sequential(kind(4)).double()
    batches = [batch.double() for batch in batches_of(size)]
    assert lrc.reestimate_batchnorm(model, batches) is model
    mean, variance = averages(batches)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=10)
def test_the_order_of_batches_does_not_matter(sizes, data):
    batches = [batch.double() for batch in batches_of((3, 3), tuple(sizes))]
    found = []
    for order in (batches, data.draw(st.permutations(batches))):
        model = nn.Sequential(nn.BatchNorm2d(4)).double()
        lrc.reestimate_batchnorm(model, iter(order))
        found.append(model[0])
    torch.testing.assert_close(found[0].running_mean, found[1].running_mean)
    torch.testing.assert_close(found[0].running_var, found[1].running_var)


def test_a_later_norm_sees_what_the_earlier_one_normalised_by_batch():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.9), nn.ReLU(), nn.BatchNorm2d(4)).double()
    nn.init.uniform_(model[0].weight)
    batches = [batch.double() for batch in batches_of((5, 4))]
    lrc.reestimate_batchnorm(model, batches)
    first = copy.deepcopy(model[0]).train()
    with torch.no_grad():
        mean, variance = averages([first(batch).relu() for batch in batches])
    torch.testing.assert_close(model[3].running_mean, mean)
    torch.testing.assert_close(model[3].running_var, variance)


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("training", [True, False])
def test_modes_momentum_and_everything_else_are_put_back(momentum, training):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=momentum), nn.Dropout())
    model.train(training)
    model[1].train(not training)
    modes, state = [m.training for m in model.modules()], state_of(model)
    lrc.reestimate_batchnorm(model, batches_of((5, 4)))
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == momentum
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_without_batches_nothing_changes():
    model = nn.Sequential(nn.BatchNorm2d(4)).eval()
    model[0].running_mean.add_(3)
    state = state_of(model)
    for empty in ([], iter(())):
        with pytest.raises(lrc.CompressionError, match="at least one batch"):
            lrc.reestimate_batchnorm(model, empty)
        assert_untouched(model, state)
        assert not any(m.training for m in model.modules())
        assert model[0].momentum == 0.1


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "stopped"])
@pytest.mark.parametrize("inside", ["model", "batches"])
def test_an_error_leaves_the_statistics_as_they_were(error, inside):
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if inside == "model" and len(x) == 3:
                raise error
            return x

    def batches():
        yield from batches_of((5, 4))
        if inside == "batches":
            raise error

    model = nn.Sequential(nn.BatchNorm2d(4), Fails(), nn.BatchNorm2d(4, momentum=None))
    model(batches_of((5, 4))[0])
    model[0].eval()
    state, modes = state_of(model), [m.training for m in model.modules()]
    with pytest.raises(type(error)):
        lrc.reestimate_batchnorm(model, batches())
    assert_untouched(model, state)
    assert [m.training for m in model.modules()] == modes
    assert [model[0].momentum, model[2].momentum] == [0.1, None]


def test_a_model_without_batch_norm_does_not_even_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4))
    state = state_of(model)

    def batches():
        raise AssertionError("must not be read")
        yield

    assert lrc.reestimate_batchnorm(model, batches()) is model
    assert_untouched(model, state)


class Auxiliary(nn.Module):
    """A second head that runs in training only, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.auxiliary(x) if self.training else self.norm(x)


def test_a_norm_that_no_batch_reaches_keeps_its_statistics():
    model = Auxiliary()
    model(batches_of((5, 4))[0])
    before = state_of(model.auxiliary)
    lrc.reestimate_batchnorm(model, batches_of((5, 4)))
    assert_untouched(model.auxiliary, before)
    torch.testing.assert_close(model.norm.running_mean.double(), averages(batches_of((5, 4)))[0])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_batches_may_be_positional_or_named(wrap):
    model = nn.BatchNorm2d(4)
    lrc.reestimate_batchnorm(model, [wrap(batch) for batch in batches_of((5, 4))])
    torch.testing.assert_close(model.running_mean.double(), averages(batches_of((5, 4)))[0])


def test_it_brings_a_compressed_network_back_to_unit_variance():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False))
    batches = batches_of((6, 6), (16, 16))
    lrc.reestimate_batchnorm(model, batches)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=1.0)).edit("0", rank=1)).eval()
    with torch.no_grad():
        broken = torch.cat([small(batch) for batch in batches]).var((0, 2, 3))
        lrc.reestimate_batchnorm(small, batches)
        mended = torch.cat([small(batch) for batch in batches]).var((0, 2, 3))
    assert (broken - 1).abs().max() > 0.1
    torch.testing.assert_close(mended, torch.ones(8), rtol=0.01, atol=0)
