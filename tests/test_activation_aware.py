"""Activation-aware options and fitted weights: errors against measured outputs, closed forms, descent."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress as lrc
from lrcompress import allocate, ops, rewrite
from lrcompress.factorize import ActivationAware, fitted_weight
from lrcompress.factorize.encoders import expanded, group_encoders, patch_order
from lrcompress.factorize.fold import fold
from lrcompress.types import Layer, LowRank, Refinement
from lrcompress.types.statistics import LayerStatistics

LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (12,)),
    "wide": (lambda: nn.Linear(6, 15), (6,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "padded": (lambda: nn.Conv2d(6, 4, 3, padding=1), (6, 5, 5)),
    "strided": (lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 7, 6)),
    "dilated": (lambda: nn.Conv2d(4, 5, (2, 3), dilation=(1, 2), padding=(0, 2)), (4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), (8, 5, 4)),
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), (6, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), (4, 3, 3, 3)),
}
CASES = [
    pytest.param(name, scheme, k, id=f"{name}-{scheme}-{k}")
    for name in LAYERS
    for scheme in ((0, 1, 2, 3) if name in ("conv", "padded", "strided", "dilated", "grouped") else (0,))
    for k in (1, 2, 4, 6)
    if {"linear": 12, "wide": 6, "padded": 6, "1d": 6}.get(name, 4) % k == 0
]


def calibrated(name, count=40, **kwargs):
    """Return a layer, correlated inputs with a mean, and its statistics; float64."""
    make, shape = LAYERS[name]
    model = nn.Sequential(make()).double()
    mix = torch.randn(shape[0], shape[0], dtype=torch.float64) + torch.eye(shape[0])
    x = torch.einsum("ij,nj...->ni...", mix, torch.randn(count, *shape, dtype=torch.float64)) + 0.4
    return model, x, lrc.collect(model, [x], **kwargs)


def described(model):
    return rewrite.describe("0", model[0])


def table(model, statistics, **settings):
    step = ActivationAware(**settings)
    return step((described(model),), (model[0].weight,), statistics.layers)[0]


def planned(model, config):
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd())
    return plan.edit("0", rank=config.rank, groups=config.groups, scheme=config.scheme)


def loss_of(weight, wanted, moments):
    """tr((W - M) R (W - M)^T) over existing groups."""
    change = (wanted - weight).flatten(1).unflatten(0, (len(moments), -1))
    return float((change @ moments * change).sum())


@pytest.mark.parametrize(("name", "scheme", "groups"), CASES)
def test_error_is_what_the_refitted_layer_loses_of_its_outputs(name, scheme, groups):
    model, x, statistics = calibrated(name)
    found = table(model, statistics, schemes=(scheme,), groups=(groups,))
    with torch.no_grad():
        y = model(x)
    size = (y - y.transpose(0, 1).flatten(1).mean(1).view(-1, *(1,) * (y.ndim - 2))).square().sum()
    rows = [row for row in range(len(found)) if found.groups[row]]
    assert len(rows) == min(
        described(model).full_rank(scheme, groups),
        (described(model).params - 1) // described(model).unit_cost(scheme, groups)[0],
    )
    for row in rows[:: max(1, len(rows) // 3)]:
        plan = planned(model, found[row].config)
        small = lrc.apply(model, plan, statistics=statistics, refinement=Refinement(sweeps=0, prior=0))
        with torch.no_grad():
            measured = float((small(x) - y).square().sum() / size)
        assert found.error[row] == pytest.approx(measured, rel=1e-4, abs=1e-9)
    errors = found.error[rows]
    assert (np.diff(errors) < 1e-9).all()


@pytest.mark.parametrize("name", ["linear", "padded", "grouped", "1d"])
def test_full_rank_loses_nothing(name):
    model, _, statistics = calibrated(name)
    layer, known = described(model), statistics.layers["0"]
    W = model[0].weight.detach()
    nothing = torch.zeros_like(W).flatten(1).unflatten(0, (layer.conv_groups, -1))
    wanted = W.flatten(1).unflatten(0, (layer.conv_groups, -1)) @ known.covariance
    for scheme, k in itertools.product(layer.schemes, (1, 2)):
        config = LowRank(scheme, k, layer.full_rank(scheme, k))
        for how in (Refinement(sweeps=0, prior=0), Refinement("weights", sweeps=2, prior=0)):
            fitted = fitted_weight(layer, W, config, known.covariance, nothing, how)
            assert torch.equal(fitted, W.double())
        order = patch_order(layer, scheme)
        for rows, flat, S in zip(fold(W, layer, scheme), wanted, known.covariance, strict=True):
            moment = torch.stack([S[c][:, c] for c in order]).sum(0)
            encoders = group_encoders(rows, moment, k)
            E = expanded(encoders, order)
            D = ops.least_squares(E @ S @ E.mT, flat @ E.mT)
            assert D.shape[1] == len(order) * k * config.rank
            left = flat - D @ E @ S
            assert float(left.norm()) < 1e-6 * float(flat.norm())


@pytest.mark.parametrize("name", ["linear", "wide", "padded", "1d"])
@pytest.mark.parametrize("refit", [True, False])
def test_one_group_loses_the_smallest_eigenvalues(name, refit):
    model, _, statistics = calibrated(name)
    S, W = statistics.layers["0"].covariance[0], model[0].weight.detach().flatten(1)
    values = torch.linalg.eigvalsh(W @ S @ W.mT).flip(0)
    found = table(model, statistics, error="absolute", groups=(1,), refit=refit)
    for row in range(len(found)):
        if found.groups[row]:
            dropped = float(values[found.rank[row] :].sum())
            assert found.error[row] == pytest.approx(dropped, rel=1e-4, abs=1e-9 * float(values.sum()))


def test_errors_are_scaled_as_documented():
    model, _, statistics = calibrated("padded", gradients=True)
    W, known = model[0].weight.detach().flatten(1), statistics.layers["0"]
    S = known.covariance[0]
    kinds = ("absolute", "relative", "energy", "fisher")
    absolute, relative, energy, fisher = (table(model, statistics, error=kind).error for kind in kinds)
    np.testing.assert_allclose(relative, absolute / float((W @ S * W).sum()), atol=1e-12)
    np.testing.assert_allclose(energy, -np.log1p(-relative), atol=1e-12)
    assert not np.allclose(fisher, absolute)
    uncentred = table(model, statistics, error="absolute", centred=False, groups=(1,))
    R = known.autocorrelation[0]
    values = torch.linalg.eigvalsh(W @ R @ W.mT)
    assert uncentred.error[uncentred.rank == 1][0] == pytest.approx(float(values[:-1].sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_fisher_weighs_outputs_by_their_gradients(name):
    """One group: sum of dropped eigenvalues of G^(1/2) W S W^T G^(1/2), for each existing group alone."""
    model, _, statistics = calibrated(name, gradients=True)
    layer, known = described(model), statistics.layers["0"]
    W = model[0].weight.detach().flatten(1).unflatten(0, (layer.conv_groups, -1))
    values = []
    outputs = layer.out_channels // layer.conv_groups
    for g, (M, S) in enumerate(zip(W, known.covariance, strict=True)):
        G = known.gradient[g * outputs : (g + 1) * outputs, g * outputs : (g + 1) * outputs]
        values.append(torch.linalg.eigvals(G @ M @ S @ M.mT).real.sort(descending=True).values)
    found = table(model, statistics, error="fisher", groups=(1,))
    total = float(torch.cat(values).sum())
    for row in range(len(found)):
        if found.groups[row]:
            dropped = sum(float(v[found.rank[row] :].sum()) for v in values)
            assert found.error[row] == pytest.approx(dropped, rel=1e-4, abs=1e-9 * total)


def test_fisher_needs_gradients():
    model, _, statistics = calibrated("linear")
    with pytest.raises(lrc.PlanError, match=r"layer '0'.*gradients=True"):
        table(model, statistics, error="fisher")


@pytest.mark.parametrize("name", ["linear", "padded", "grouped"])
@pytest.mark.parametrize("refit", [True, False])
def test_few_samples_and_constant_inputs_are_safe(name, refit):
    model, x, _ = calibrated(name, count=2)
    x[:, ::2] = 3.0  # every second channel constant
    found = table(model, lrc.collect(model, [x]), schemes=(0, 1, 2, 3), refit=refit)
    assert ((found.error >= 0) & (found.error <= 1)).all()
    assert found.error[0] == 0
    constant = table(model, lrc.collect(model, [torch.zeros_like(x)]))
    assert (constant.error == 0).all()


@pytest.mark.parametrize(("rows", "width"), [(3, 8), (8, 8), (20, 8)])
@pytest.mark.parametrize("groups", [1, 4])
def test_both_routes_to_the_encoders_span_the_same_codes(rows, width, groups):
    """The energy explained by the first r codes is that of W S^(1/2)'s first r singular values."""
    M = torch.randn(rows, width * groups, dtype=torch.float64)
    x = torch.randn(300, width * groups, dtype=torch.float64) * torch.linspace(0.1, 3, width * groups)
    S = x.T @ x / 300
    encoders = group_encoders(M, S, groups)
    assert encoders.shape == (groups, min(rows, width), width)
    for i, E in enumerate(encoders):
        own = slice(i * width, (i + 1) * width)
        values, vectors = torch.linalg.eigh(S[own, own])
        root = (vectors * values.sqrt()) @ vectors.mT
        wanted = torch.linalg.svdvals(M[:, own] @ root).square().cumsum(0)
        codes = E @ S[own, own] @ E.mT
        torch.testing.assert_close(codes, codes.diagonal().diag(), atol=1e-9, rtol=1e-9)
        explained = (M[:, own] @ S[own, own] @ E.mT).square().sum(0) / codes.diagonal()
        torch.testing.assert_close(explained.cumsum(0), wanted)


@pytest.mark.parametrize("name", ["linear", "wide", "padded", "grouped", "strided"])
@pytest.mark.parametrize("encoder", ["inputs", "weights"])
def test_fits_and_sweeps_never_lose_more(name, encoder):
    """Against truncated SVDs, and from sweep to sweep; rounding and the ridge apart."""
    model, _, statistics = calibrated(name)
    layer, R = described(model), statistics.layers["0"].covariance
    W = model[0].weight.detach()
    nothing = torch.zeros_like(W).flatten(1).unflatten(0, (layer.conv_groups, -1))
    slack = 1e-9 * loss_of(0 * W, W, R)
    for scheme, k in itertools.product(layer.schemes, (1, 2)):
        config = LowRank(scheme, k, max(1, layer.full_rank(scheme, k) // 2))
        losses = [loss_of(_truncated(layer, W, config), W, R)] if encoder == "weights" else []
        for sweeps in range(4):
            fitted = fitted_weight(layer, W, config, R, nothing, Refinement(encoder, sweeps, prior=0))
            assert _has_structure(layer, fitted, config)
            losses.append(loss_of(fitted, W, R))
        assert all(after <= before + slack for before, after in itertools.pairwise(losses)), losses


def _truncated(layer, W, config):
    """Factor each column group of each existing group by itself, without data."""
    rows = fold(W, layer, config.scheme).unflatten(2, (config.groups, -1)).transpose(1, 2)
    U, s, V = torch.linalg.svd(rows, full_matrices=False)
    r = config.rank
    parts = (U[..., :r] * s[..., None, :r]) @ V[..., :r, :]
    return _unfolded(layer, parts.transpose(1, 2).flatten(2), config.scheme)


def _unfolded(layer, folded, scheme):
    """Put a folded matrix back into the order of ``weight.flatten(1)``, as a weight."""
    order = patch_order(layer, scheme)
    outputs = layer.out_channels // layer.conv_groups
    flat = folded.new_zeros(layer.conv_groups, outputs, order.numel())
    by_position = folded.unflatten(1, (outputs, len(order)))  # [groups, out, area, columns]
    for position, columns in enumerate(order):
        flat[:, :, columns] = by_position[:, :, position]
    return flat.view(layer.weight_shape)


def _has_structure(layer, weight, config):
    blocks = fold(weight, layer, config.scheme).unflatten(2, (config.groups, -1)).transpose(1, 2)
    values = torch.linalg.svdvals(blocks)
    return bool((values[..., config.rank :] <= 1e-9 * values[..., :1]).all())


@pytest.mark.parametrize("scheme", [0, 1, 2, 3])
def test_columns_of_a_patch_are_those_that_fold_takes(scheme):
    layer = Layer("x", "Conv2d", (4, 6, 3, 2), conv_groups=2)
    W = torch.arange(144.0).view(4, 6, 3, 2)
    assert torch.equal(_unfolded(layer, fold(W, layer, scheme), scheme), W)


@pytest.mark.parametrize("name", ["linear", "padded"])
def test_one_group_with_whitened_encoders_is_a_fixed_point(name):
    """The best decoder is then the one that the encoders come with, U, and sweeps move nothing."""
    model, _, statistics = calibrated(name)
    layer, S = described(model), statistics.layers["0"].covariance
    W = model[0].weight.detach().flatten(1)
    U = torch.linalg.eigh(W @ S[0] @ W.mT).eigenvectors.flip(1)[:, :2]
    for sweeps in (0, 3):
        fitted = fitted_weight(
            layer, model[0].weight, LowRank(0, 1, 2), S, 0 * W @ S, Refinement(sweeps=sweeps, prior=0)
        ).flatten(1)
        torch.testing.assert_close(fitted, U @ U.mT @ W, atol=1e-4, rtol=1e-4)


def test_fits_reach_targets_that_are_not_the_layers_own():
    """Outputs wanted of other inputs: the best of rank r is a truncated SVD of C S^(-1/2), whitened back."""
    layer, generator = Layer("x", "Linear", (5, 8)), torch.Generator().manual_seed(1)
    x, y = (torch.randn(90, n, generator=generator, dtype=torch.float64) for n in (8, 5))
    y = y + x[:, :5] * 2
    S, C = x.T @ x / 90, y.T @ x / 90
    values, vectors = torch.linalg.eigh(S)
    white = (vectors * values.rsqrt()) @ vectors.mT
    U, s, V = torch.linalg.svd(C @ white)
    best = (U[:, :2] * s[:2]) @ V[:2] @ white
    W = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    missing = (C - W @ S)[None]
    fitted = fitted_weight(layer, W, LowRank(0, 1, 2), S[None], missing, Refinement(sweeps=1, prior=0))
    torch.testing.assert_close(fitted, best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sweeps", [0, 1, 4])
def test_without_any_variance_the_weight_is_truncated_as_without_data(sweeps):
    layer, W = Layer("x", "Linear", (4, 6)), torch.randn(4, 6, dtype=torch.float64)
    nothing = torch.zeros(1, 6, 6, dtype=torch.float64)
    config = LowRank(0, 2, 1)
    fitted = fitted_weight(layer, W, config, nothing, nothing[:, :4], Refinement(sweeps=sweeps, prior=0))
    torch.testing.assert_close(fitted, _truncated(layer, W, config))


def test_the_prior_keeps_what_the_weight_says_where_the_data_is_silent():
    """Three samples of nine inputs; a strong prior leaves the truncated SVD of the weight."""
    layer = described(nn.Sequential(nn.Linear(9, 7)))
    W, x, y = (torch.randn(n, m, dtype=torch.float64) for n, m in ((7, 9), (3, 9), (3, 7)))
    S, C = (x.T @ x / 3)[None], ((y - x @ W.T).T @ x / 3)[None]
    silent = torch.linalg.svd(x).Vh[3:].T  # [9, 6]
    fitted = fitted_weight(layer, W, LowRank(0, 1, 7), S, C, Refinement(prior=1e-2))
    torch.testing.assert_close(fitted @ silent, W @ silent, atol=1e-3, rtol=1e-3)
    assert float((fitted @ x.T - y.T).norm()) < 0.1 * float(y.norm())
    U, s, V = torch.linalg.svd(W)
    strong = fitted_weight(layer, W, LowRank(0, 1, 2), S, C, Refinement(prior=1e9))
    torch.testing.assert_close(strong, (U[:, :2] * s[:2]) @ V[:2], atol=1e-6, rtol=1e-6)


def test_refinements_that_make_no_sense_are_refused():
    with pytest.raises(lrc.PlanError, match=r"'other', -1 and None"):
        Refinement("other", -1)
    with pytest.raises(lrc.PlanError, match=r"'inputs', 4 and -0\.1"):
        Refinement(prior=-0.1)


def test_options_larger_than_dense_are_left_out_and_ranks_thinned():
    model, _, statistics = calibrated("linear")
    found = table(model, statistics, ranks=3, groups=(1,))
    assert list(found.rank[found.groups > 0]) == [1, 2, 4]
    assert (found.params[1:] < found.params[0]).all()
    assert isinstance(lrc.activation_aware().global_step, allocate.WeightedSum)


def test_order_of_moments_follows_the_layer_named():
    known = LayerStatistics(torch.eye(6, dtype=torch.float64)[None], torch.zeros(1, 6).double(), 9)
    layer, W = Layer("a", "Linear", (3, 6)), torch.randn(3, 6)
    other = Layer("b", "Linear", (3, 6))
    scaled = LayerStatistics(4 * known.autocorrelation, known.mean, 9)
    step = ActivationAware("absolute")
    first, second = step((layer, other), (W, W), {"b": scaled, "a": known})
    np.testing.assert_allclose(second.error, 4 * first.error, rtol=1e-9)
