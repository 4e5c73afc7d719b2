"""Batch norms and activations to parts of the layers in front of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lrcompress.nn.choices import Activation
from lrcompress.nn.own import OwnForward
from lrcompress.rewrite.layers import DENSE, Dense, Factored, kind_of
from lrcompress.rewrite.layout import memory_format_of, set_memory_format
from lrcompress.rewrite.survey import TIED, is_tied, left_out, owners_of_parameters, unusual
from lrcompress.rewrite.swap import replaced
from lrcompress.types import Fold, Folding, PlanError, Uses

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Dense | Transposed | Factored

_MARK = "folded"  # attribute of layers that took something in

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
_KINDS: tuple[type[nn.Module], ...] = (
    *DENSE,
    *get_args(Transposed),
    *get_args(Factored),
    *_NORMS,
    *_ACTIVATIONS,
)


def foldable_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return all layers, batch norms and activations that folding is about."""
    kinds: tuple[type[nn.Module], ...] = (*_KINDS, _BatchNorm)  # and subclasses, to say why they stay
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not isinstance(module, OwnForward)  # the layer in it is a part
    }


def foldable(
    model: nn.Module,
    uses: Mapping[str, Uses],  # of those of `foldable_parts` that ran
) -> Folding:
    """Decide which batch norms and activations can be folded, and say why not the others."""
    found = _Decision(foldable_parts(model), uses, owners_of_parameters(model))
    reasons = {}
    for kinds, decide in ((_BatchNorm, found.norm), (tuple(_ACTIVATIONS), found.activation)):
        for name, module in found.parts.items():
            if isinstance(module, kinds):
                reasons[name] = decide(name)
    folds = tuple(
        Fold(name, found.norms.get(name), found.activations.get(name))
        for name in found.parts
        if name in found.norms or name in found.activations
    )
    return Folding(
        folds,
        tuple(left_out(name, found.parts[name], why) for name in found.parts if (why := reasons.get(name))),
    )


class _Decision:
    """What is folded into which layer: norms first, then activations."""

    def __init__(
        self, parts: Mapping[str, nn.Module], uses: Mapping[str, Uses], owners: Counter[int]
    ) -> None:
        self.parts, self._uses, self._owners = parts, uses, owners
        self.norms: dict[str, str] = {}  # layer -> batch norm
        self.activations: dict[str, str] = {}  # layer -> activation

    def norm(self, name: str) -> str | None:
        """Fold one batch norm, or say why it stays."""
        maker, reason = self._maker(name)
        if reason is not None:
            return reason
        layer, norm = self.parts[maker], self.parts[name]
        if not isinstance(layer, Layer):
            return f"what it reads is the output of {maker!r}, a {type(layer).__name__}"
        if isinstance(layer, Factored) and layer.activation != "none":
            return f"{maker!r} ends with an activation, {layer.activation}"
        axes = _decoder(layer).ndim
        if self._uses[maker].axes != axes:
            return f"the output of {maker!r} must have {axes} axes, got {self._uses[maker].axes}"
        assert isinstance(norm, _BatchNorm)
        if not all(tensor.isfinite().all() for tensor in _joined(layer, norm)):
            return f"with it, the weight of {maker!r} would not be finite"
        self.norms[maker] = name
        return None

    def activation(self, name: str) -> str | None:
        """Fold one activation, or say why it stays."""
        maker, reason = self._maker(name)
        if reason is not None:
            return reason
        maker = next((layer for layer, norm in self.norms.items() if norm == maker), maker)
        layer = self.parts[maker]
        if not isinstance(layer, Factored):
            return (
                f"what it reads is the output of {maker!r}, a {type(layer).__name__}, not of a factored layer"
            )
        if layer.activation != "none":
            return f"{maker!r} ends with an activation, {layer.activation}"
        self.activations[maker] = name
        return None

    def _maker(self, name: str) -> tuple[str, str | None]:
        """Return the module whose output another one alone reads; or why there is none."""
        if name not in self._uses:
            return "", "it did not run on the example inputs"
        reason = self._own_reason(name)
        inside = f"{name}."  # what follows the norm in a module that joins them
        makers = [m for m, use in self._uses.items() if name in use.readers and not m.startswith(inside)]
        if reason is not None or len(makers) != 1:
            return "", reason or "what it reads is not the output of a layer"
        (maker,) = makers
        use = self._uses[maker]
        if reason := self._own_reason(maker):
            return "", f"{maker!r}, which it reads: {reason}"
        also = [*(repr(other) for other in use.readers if other != name), *use.others]
        if also:
            return "", f"the output of {maker!r} is also read by {', '.join(also)}"
        return maker, None

    def _own_reason(self, name: str) -> str | None:
        """Say why a module that ran must stay as it is, whatever is around it."""
        module, use = self.parts[name], self._uses[name]
        if use.calls > 1:
            return f"it runs {use.calls} times in one forward"
        if is_tied(module, self._owners):
            return TIED
        if use.own:
            return f"its parameters are also read by {', '.join(use.own)}"
        if isinstance(module, _BatchNorm) and module.training:
            return "it is in training mode"
        if isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None):
            return "it has no running statistics"
        if kind_of(module) not in _KINDS and unusual(module) is None and _left_of(module) is None:
            return f"a subclass of {type(module).__mro__[1].__name__} may compute otherwise"
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return f"its approximation must be 'none', got {module.approximate!r}"
        if isinstance(module, Layer) and not isinstance(_decoder(module), nn.Parameter):
            return "its weight is computed from other parameters"
        if any(parameter.is_meta for parameter in module.parameters()):
            return "it is on the meta device and holds no values"
        return unusual(module)


def folded(
    model: nn.Module,  # in evaluation mode; untouched
    folding: Folding,
) -> nn.Module:
    """Copy the model with batch norms and activations as parts of layers: the same function.

    Raises:
        PlanError: a fold names what the model does not have, or what does not fit each other.
    """
    check_folds(model, folding.folds)
    old = dict(model.named_modules())
    gone: dict[str, nn.Module] = {}
    for name in (name for fold in folding.folds for name in fold.gone):
        left = _left_of(old[name])
        if left is None:
            raise PlanError(
                f"{name!r} must be a batch norm and what follows it, got {type(old[name]).__name__}"
            )
        gone[name] = left
    copied = replaced(model, gone)
    new = dict(copied.named_modules())
    for fold in folding.folds:
        layer = new[fold.layer]
        assert isinstance(layer, Layer)
        if fold.norm is not None:
            _absorb(layer, old[fold.norm])
        if fold.activation is not None:
            assert isinstance(layer, Factored)
            layer.activation = _ACTIVATIONS[type(old[fold.activation])]
        layer.__dict__[_MARK] = fold.gone
    return copied


def check_folds(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Check that layers, batch norms and activations are there and fit each other.

    Raises:
        PlanError: they are not; the message names them.
    """
    parts, owners = dict(model.named_modules()), owners_of_parameters(model)
    named = [name for fold in folds for name in (fold.layer, *fold.gone)]
    if len({id(parts[name]) for name in named if name in parts}) < len(named):
        raise PlanError(f"folds must name modules of the model, each once, got {named}")
    for fold in folds:
        layer, norm = parts[fold.layer], parts.get(fold.norm or "")
        fits = type(layer) in _KINDS and isinstance(layer, Layer) and not is_tied(layer, owners)
        if fold.norm is not None:
            channels = _rows(layer, _decoder(layer)).shape[0] if fits and isinstance(layer, Layer) else 0
            tracked = isinstance(norm, _BatchNorm) and norm.running_mean is not None
            fits = fits and tracked and isinstance(norm, _BatchNorm) and norm.num_features == channels
        if fold.activation is not None:
            factored = isinstance(layer, Factored) and layer.activation == "none"
            fits = fits and factored and type(parts[fold.activation]) in _ACTIVATIONS
        if not fits or not fold.gone:
            raise PlanError(f"{' and '.join(fold.gone) or 'nothing'} cannot be folded into {fold.layer!r}")


def folded_into(module: nn.Module) -> tuple[str, ...]:
    """Name what was folded into a layer."""
    names: tuple[str, ...] = module.__dict__.get(_MARK, ())
    return names


def check_unfolded(model: nn.Module) -> None:
    """Refuse a model that `folded` made: it is no longer what its architecture and a plan make.

    Raises:
        PlanError: something was folded into a layer; both are named.
    """
    for name, module in model.named_modules():
        if gone := folded_into(module):
            raise PlanError(
                f"layer {name!r} must be as `apply` left it, got one with {' and '.join(gone)} folded in: "
                "save the model that was folded, and fold what `load` returns"
            )


def forget_folds(
    model: nn.Module,  # changed in place
) -> nn.Module:
    """Take the model for one that was built like this. Returns ``model``."""
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
    return model


def _left_of(module: nn.Module) -> nn.Module | None:
    """Return what stays of a module that is folded; None where it cannot be."""
    if kind_of(module) in _KINDS:
        return nn.Identity().eval()
    return _after_norm(module) if isinstance(module, _BatchNorm) else None


def _after_norm(norm: _BatchNorm) -> nn.Module | None:
    """Return a copy of what a batch norm with modules inside does after the norm; None if it does not.

    That is its modules in their order, where with random numbers they give exactly what the whole gives: so
    a batch norm that is joined with its activation is known whatever its class.
    """
    parts = [copy.deepcopy(part) for part in norm.children() if not isinstance(part, nn.Identity)]
    rest = parts[0] if len(parts) == 1 else nn.Sequential(*parts).eval()
    probe, random = copy.deepcopy(norm), torch.Generator().manual_seed(0)
    mean, variance, gain, shift = probe.running_mean, probe.running_var, probe.weight, probe.bias
    if mean is None or mean.is_meta or any(part.training for part in rest.modules()):
        return None
    kernel = 3 if isinstance(norm, nn.BatchNorm3d) else 1 if isinstance(norm, nn.BatchNorm1d) else 2
    x = torch.randn((2, len(mean), *(3,) * kernel), generator=random).to(mean.device, mean.dtype)
    with torch.no_grad():
        for vector in (mean, variance, gain, shift):
            if vector is not None:
                vector.copy_(torch.rand(vector.shape, generator=random) + 0.5)
        normed = nn.functional.batch_norm(x, mean, variance, gain, shift, training=False, eps=norm.eps)
        try:
            same = torch.equal(probe(x), rest(normed))
        except (TypeError, RuntimeError, ValueError):  # it takes other inputs, or gives no tensor
            same = False
    return rest if same else None


def _decoder(layer: Layer) -> Tensor:
    """Return the weight with a row, or in a transposed convolution a column, for each output."""
    weight = layer.U if isinstance(layer, Factored) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _absorb(layer: Layer, norm: nn.Module) -> None:
    """Give a layer the scale and the shift of the batch norm behind it."""
    memory_format, old = memory_format_of(layer), _decoder(layer)
    weight, bias = (nn.Parameter(new, old.requires_grad) for new in _joined(layer, norm))
    if layer.bias is not None:
        bias.requires_grad_(layer.bias.requires_grad)
    if isinstance(layer, Factored):
        layer.U, layer.bias = weight, bias
    else:
        layer.weight, layer.bias = weight, bias
    set_memory_format(layer, memory_format)


def _joined(layer: Layer, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a layer's decoder and bias with a batch norm in them: in float64, rounded once.

    W' = W g / sqrt(v + eps) and b' = (b - m) g / sqrt(v + eps) + h for mean m, variance v, gain g, shift h.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old = _decoder(layer)
    weight, mean, variance = (_wide(t) for t in (old, norm.running_mean, norm.running_var))
    bias, gain, shift = (None if t is None else _wide(t) for t in (layer.bias, norm.weight, norm.bias))
    rows = _rows(layer, weight)
    rows, bias = fuse_conv_bn_weights(rows, bias, mean, variance, norm.eps, gain, shift)
    new = _rows(layer, rows.detach())
    return (new.to(old.device, old.dtype), bias.detach().to(old.device, old.dtype))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _rows(layer: Layer, weight: Tensor) -> Tensor:
    """Swap inputs and outputs in each group of a transposed convolution's weight: there, and back."""
    if not isinstance(layer, Transposed):
        return weight  # [out, ...]
    grouped: Tensor = weight.unflatten(0, (layer.groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)
