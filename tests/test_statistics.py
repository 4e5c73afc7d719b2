"""Statistics of calibration batches: against stored patches, and through every way to collect them."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lrcompress as lrc
from lrcompress.types.statistics import LayerStatistics


class Net(nn.Module):
    """Grouped and strided convolutions, a layer that runs twice, one that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.point = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)
        self.idle = nn.Linear(3, 3)

    def forward(self, x):
        x = self.inner(self.stem(x).relu()).relu()
        x = self.point(self.point(x).tanh())
        return self.fc(x.mean((2, 3)))


def network(kind=Net):
    torch.manual_seed(3)
    return kind().double().eval()


def samples(count=11, seed=5):
    return (
        torch.randn(count, 4, 7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    )


def patches(layer, x):
    """Store every patch, [groups, patches, d]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    pads = [p for pad in reversed(layer.padding) for p in (pad, pad)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, pads, mode=mode) if any(pads) else x
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def assert_same(ours, others):
    """Equal but for the order in which float64 numbers are added up."""
    assert list(ours.layers) == list(others.layers)
    assert (ours.fingerprint, ours.batches) == (others.fingerprint, others.batches)
    assert ours.unreached == others.unreached
    for name, known in ours.layers.items():
        other = others.layers[name]
        assert known.samples == other.samples
        torch.testing.assert_close(known.autocorrelation, other.autocorrelation)
        torch.testing.assert_close(known.mean, other.mean)
        assert (known.gradient is None) == (other.gradient is None)
        if known.gradient is not None:
            torch.testing.assert_close(known.gradient, other.gradient)


@pytest.fixture
def model():
    return network()


@pytest.fixture
def whole(model):
    return lrc.collect(model, samples().split(4))


def test_moments_are_those_of_stored_patches_over_all_calls(model, whole):
    seen = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda m, x, n=name: seen.setdefault(n, []).append(patches(m, x[0])))
    model(samples())
    assert list(whole.layers) == ["stem", "inner", "point", "fc"]
    assert len(seen["point"]) == 2
    for name, known in whole.layers.items():
        stored = torch.cat(seen[name], 1)
        count = stored.shape[1]
        torch.testing.assert_close(known.autocorrelation, stored.mT @ stored / count)
        torch.testing.assert_close(known.mean, stored.mean(1))
        torch.testing.assert_close(known.covariance, torch.stack([s.T.cov(correction=0) for s in stored]))
        assert known.samples == count
        assert known.gradient is None


def test_layers_that_no_batch_reached_are_listed(whole):
    assert whole.unreached == ("idle",)
    assert whole.batches == 3


def test_a_module_under_two_names_adds_up_its_calls():
    layer = nn.Linear(4, 4).double()
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(9, 4, dtype=torch.float64)
    found = lrc.collect(model, [x])
    stored = torch.cat([x, layer(x).tanh()]).detach()
    assert [known.samples for known in found.layers.values()] == [18]
    torch.testing.assert_close(found.layers["0"].autocorrelation[0], stored.T @ stored / 18)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_other_numbers_of_axes(kind):
    axes = {nn.Conv1d: 1, nn.Conv3d: 3}[kind]
    model = nn.Sequential(kind(3, 2, 2, bias=False)).double()
    x = torch.randn(2, 3, *(4,) * axes, dtype=torch.float64)
    stored = x
    for axis in range(2, 2 + axes):
        stored = stored.unfold(axis, 2, 1)
    stored = stored.movedim(1, 1 + axes).flatten(1 + axes).flatten(0, axes)
    known = lrc.collect(model, [x]).layers["0"]
    torch.testing.assert_close(known.autocorrelation[0], stored.T @ stored / len(stored))


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.inner.eval()
    model.stem.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lrc.collect(model, [samples()], gradients=True)
    assert model.training
    assert not model.inner.training
    assert [p.requires_grad for p in model.stem.parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_are_tensors_tuples_or_mappings_and_can_be_transformed(model, whole):
    parts = samples().split(4)
    assert_same(lrc.collect(model, [(part,) for part in parts]), whole)
    assert_same(lrc.collect(model, [{"x": part} for part in parts]), whole)
    labelled = [(part, torch.zeros(len(part))) for part in parts]
    assert_same(lrc.collect(model, iter(labelled), transform=lambda batch: batch[0]), whole)
    assert_same(lrc.collect(model, labelled, forward=lambda m, batch: m(batch[0])), whole)


def test_inputs_given_by_keyword_are_seen():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.fc(input=x)

    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(lrc.collect(Wrapped(), [x]).layers["fc"].mean[0], x.mean(0))


def test_merged_and_continued_runs_equal_one_run(model, whole):
    first, second, third = (lrc.collect(model, [part]) for part in samples().split(4))
    assert_same(first.merge(second, third), whole)
    assert_same(third.merge(first).merge(second), whole)
    assert_same(lrc.collect(model, samples()[8:].split(4), into=first.merge(second)), whole)
    assert_same(lrc.collect(model, [], into=whole), whole)


def test_merging_completes_layers_that_one_run_did_not_reach():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, first):
            return self.a(x) if first else self.b(x)

    model, x = Either(), torch.randn(5, 2)
    one, other = (lrc.collect(model, [(x, first)]) for first in (True, False))
    assert (one.unreached, other.unreached) == (("b",), ("a",))
    assert set(one.merge(other).layers) == {"a", "b"}
    assert one.merge(other).unreached == ()


@pytest.mark.parametrize("gradients", [False, True])
def test_statistics_survive_a_file(model, tmp_path, gradients):
    found = lrc.collect(model, samples().split(4), gradients=gradients)
    found.save(tmp_path / "statistics.safetensors")
    again = lrc.Statistics.load(tmp_path / "statistics.safetensors")
    assert_same(again, found)
    assert all((known.gradient is not None) == gradients for known in again.layers.values())
    for name, known in again.layers.items():
        assert torch.equal(known.autocorrelation, found.layers[name].autocorrelation)


def interrupted(statistics):
    """An interrupted run has not looked for layers that nothing reached."""
    return dataclasses.replace(statistics, unreached=())


def test_subsets_of_layers_give_what_one_pass_gives(model):
    parts, steps = samples().split(4), []
    whole = lrc.collect(model, parts, gradients=True)
    small = lrc.collect(model, parts, gradients=True, memory=1, progress=steps.append)
    assert_same(small, whole)
    assert steps == [1, 2, 3] * 5  # a pass for each layer, the idle one too
    with pytest.raises(lrc.CompressionError, match=r"memory=1 takes 5 passes .* got an iterator"):
        lrc.collect(model, iter(parts), memory=1)
    assert_same(lrc.collect(model, iter(parts), gradients=True, memory=1 << 30), whole)


@pytest.mark.parametrize("memory", [None, 1])
def test_what_was_collected_before_an_error_can_be_resumed(model, whole, memory):
    parts = samples().split(4)

    class Broken:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield parts[0]
            if self.passes == 1 or memory is None:
                raise OSError("disk gone")
            yield from parts[1:]

    with pytest.raises(lrc.CollectionInterrupted, match=r"batch 1: disk gone; 1 batches before") as caught:
        lrc.collect(model, Broken(), memory=memory)
    kept = caught.value.statistics
    assert kept.batches == 1
    if memory is None:
        assert_same(kept, interrupted(lrc.collect(model, parts[:1])))
        assert_same(lrc.collect(model, parts[1:], into=kept), whole)


def test_nan_names_batch_and_layer_and_leaves_its_batch_out(model):
    parts = [part.clone() for part in samples().split(4)]

    def broken(model, x):  # the last batch breaks behind a layer
        model.inner(model.stem(x) * (torch.nan if len(x) == 3 else 1))

    with pytest.raises(lrc.CollectionInterrupted, match=r"batch 2: .*layer 'inner'.* nan") as caught:
        lrc.collect(model, parts, forward=broken)
    assert_same(caught.value.statistics, interrupted(lrc.collect(model, parts[:2], forward=broken)))
    parts[0][1, 2, 3, 3] = torch.inf
    with pytest.raises(lrc.CollectionInterrupted, match=r"batch 0: .*layer 'stem'.*infinity"):
        lrc.collect(model, parts)


def test_statistics_of_another_model_are_refused(model, whole):
    torch.manual_seed(4)
    other = lrc.collect(Net().double(), [samples()])
    assert other.fingerprint != whole.fingerprint
    both = f"{whole.fingerprint}.*{other.fingerprint}"
    with pytest.raises(lrc.PlanError, match=both):
        whole.merge(other)
    with pytest.raises(lrc.PlanError, match=both):
        lrc.collect(model, [samples()], into=other)
    assert lrc.collect(network(), [samples()]).fingerprint == whole.fingerprint


def test_no_batches_are_refused(model):
    for empty in ([], iter([])):
        with pytest.raises(lrc.CompressionError, match="at least one batch, got none"):
            lrc.collect(model, empty)


def test_batches_without_samples_reach_nothing(model):
    assert lrc.collect(model, [samples()[:0]]).layers == {}


def test_ignored_layers_are_not_collected(model):
    found = lrc.collect(model, [samples()], ignore=["i*", "fc"])
    assert (list(found.layers), found.unreached) == (["stem", "point"], ())


@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_those_of_each_sample(batch):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(8, 4, dtype=torch.float64)

    def loss(y):
        return (y.square() * torch.arange(1, 4)).sum()

    found = lrc.collect(model, x.split(batch), gradients=True, loss=loss)
    wanted = {"0": [], "2": []}
    for row in x:
        hidden = model[0](row)
        output = model[2](hidden.tanh())
        for name, g in zip(wanted, torch.autograd.grad(loss(output), [hidden, output]), strict=True):
            wanted[name].append(g)
    for name, rows in wanted.items():
        g = torch.stack(rows)
        torch.testing.assert_close(found.layers[name].gradient, g.T @ g / len(x))


def test_sampled_labels_give_the_fisher_information_of_the_softmax():
    model = nn.Sequential(nn.Linear(2, 3)).double()
    x = torch.randn(1, 2, dtype=torch.float64).expand(40000, 2)
    share = model(x[:1])[0].softmax(0).detach()
    found = lrc.collect(model, [x], gradients=True).layers["0"].gradient
    fisher = share.diag() - share[:, None] * share
    assert (found - fisher).abs().max() < 4 / 40000**0.5  # entries of g g^T lie in [-1, 1]


def test_moments_of_wrong_shapes_are_refused():
    with pytest.raises(lrc.PlanError, match=r"\[1, 3, 3\].*got \[1, 3, 2\] of 4"):
        LayerStatistics(torch.zeros(1, 3, 2), torch.zeros(1, 3), 4)


def _reduce(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parts = samples().split(4)
    mine = lrc.collect(network(), parts[:2] if rank == 0 else parts[2:])
    mine.all_reduce().save(f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_processes_share_what_they_collected(tmp_path: Path, whole):
    mp.spawn(_reduce, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert_same(lrc.Statistics.load(tmp_path / str(rank)), whole)


def test_sums_of_a_batch_are_kept_once_each_and_constants_have_no_variance():
    layer = nn.Conv2d(4, 2, 3, groups=2)
    batches = [torch.randn(3, 4, 6, 5) for _ in range(4)]
    for batch in batches:
        batch[:, 1] = 0.7
    found = lrc.collect(nn.Sequential(layer), batches).layers["0"]
    x = torch.cat(batches).double()
    columns = torch.nn.functional.unfold(x, 3).transpose(0, 1).reshape(2, 18, -1)
    mean = columns.mean(2)
    exact = columns @ columns.mT / columns.shape[2]
    torch.testing.assert_close(found.autocorrelation, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    assert found.samples == columns.shape[2]
    constant = slice(9, 18)  # of the first group
    outer = found.mean[0, :, None] * found.mean[0]
    assert torch.equal(found.autocorrelation[0, constant], outer[constant])
    assert torch.equal(found.autocorrelation[0, :, constant], outer[:, constant])
    assert torch.equal(found.autocorrelation, found.autocorrelation.mT)
