"""The network without some of its channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrcompress import rewrite
from lrcompress.nn import SelectInputs
from lrcompress.removal.vectors import count_of, own_tensors, vectors_of
from lrcompress.types import PlanError, Removal, Slot


def removed(
    model: nn.Module,
    removals: Sequence[Removal],
    means: Mapping[str, Tensor] | None = None,  # of each consumer's inputs: [in], or [in prod(kernel)]
    *,
    hollow: bool = False,
) -> nn.Module:
    """Copy the model without the channels that the removals drop; modules keep their classes and names.

    Producers lose rows, followers entries, consumers columns. A layer on the network's inputs becomes the
    ``nn.SelectInputs`` of itself. With ``means``, what the removed columns gave on average is added to the
    consumer's bias, which is made where there is none. That is exact for channels that are constant, except
    where a convolution pads: the borders of its output saw less of the constant. Means of all columns of the
    unfolded input make the output's mean exact there too. With ``hollow`` what is only copied has no values.

    Raises:
        PlanError: two removals share a coupling, one does not fit the model, or a consumer has no means.
    """
    modules, cuts = dict(model.named_modules()), check_fits(model, removals)
    new = {name: _narrow(name, modules[name], cut, means) for name, cut in cuts.items()}
    for removal in removals:
        if not removal.coupling.producers:
            (slot,) = removal.coupling.consumers
            new[slot.name] = _selecting(new[slot.name], removal)
    return rewrite.replaced(model, new, hollow)


@dataclass
class Cut:
    """What goes from one module, by kind: "rows", "columns" or "channels"."""

    gone: dict[str, set[int]] = field(default_factory=dict)
    owned: dict[str, list[range]] = field(default_factory=dict)  # by one removal each


def check_fits(model: nn.Module, removals: Sequence[Removal]) -> dict[str, Cut]:
    """Return what goes from each module.

    Sizes are compared with the module's before any index is listed: a plan can claim any number of channels.

    Raises:
        PlanError: two removals share a coupling, or one does not fit the model; the message names the module.
    """
    names = [removal.coupling.name for removal in removals]
    if len(set(names)) < len(names):
        raise PlanError(f"each coupling can be reduced once, got {names}")
    modules, cuts = dict(model.named_modules()), dict[str, Cut]()
    for removal in removals:
        coupling = removal.coupling
        whole = not coupling.producers  # all inputs of one layer
        if whole and len(coupling.consumers) != 1:
            raise PlanError(f"{coupling.name!r} must be read by one layer, got {list(coupling.consumers)}")
        rows = tuple(Slot(name) for name in coupling.producers)
        places = (("rows", rows), ("channels", coupling.followers), ("columns", coupling.consumers))
        for kind, slot in ((kind, slot) for kind, slots in places for slot in slots):
            owned = range(slot.offset, slot.offset + coupling.channels * slot.width)
            _check(slot.name, modules.get(slot.name), kind, owned, whole or kind == "rows")
            cut = cuts.setdefault(slot.name, Cut())
            taken = cut.owned.setdefault(kind, [])
            if any(max(owned.start, other.start) < min(owned.stop, other.stop) for other in taken):
                raise PlanError(f"{kind} {owned} of {slot.name!r} are removed twice")
            taken.append(owned)
            cut.gone.setdefault(kind, set()).update(removal.gone(slot))
    return cuts


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return how many rows and columns, or channels of their own, a module has."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return {"channels": module.in_channels} if module.groups == module.in_channels else {}
    if isinstance(module, rewrite.Dense):
        return {"rows": module.weight.shape[0], "columns": module.weight.shape[1]}
    count = count_of(module)
    return {"channels": count} if count else {}


def _check(name: str, module: nn.Module | None, kind: str, owned: range, whole: bool) -> None:
    """Refuse a module that is missing, of another kind, or of another size than a coupling says."""
    if module is None:
        raise PlanError(f"channels are to be removed from {name!r}, the model has no module of that name")
    size = _sizes(module).get(kind, 0)
    if size < owned.stop or (whole and owned != range(size)):
        raise PlanError(
            f"{name!r} must have {owned.stop} {kind} to remove from, got {type(module).__name__} with {size}"
        )


def _stay(count: int, gone: set[int], like: Tensor) -> Tensor:
    """Return the indices that stay."""
    return torch.tensor([i for i in range(count) if i not in gone], dtype=torch.int64, device=like.device)


def _narrow(name: str, module: nn.Module, cut: Cut, means: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a narrower copy of one module."""
    nothing = torch.empty(0, device="meta")  # in the copy, until its tensors are set
    new = copy.deepcopy(module, {id(tensor): nothing for tensor in own_tensors(module).values()})
    if "channels" in cut.gone:
        _narrow_follower(module, new, cut.gone["channels"])
        return new
    assert isinstance(module, rewrite.Dense)
    rows, columns = cut.gone.get("rows", set()), cut.gone.get("columns", set())
    weight, bias = module.weight, module.bias
    if means is not None and columns:
        if name not in means:
            raise PlanError(f"columns are removed from {name!r}: means must have it, got {sorted(means)}")
        bias = _folded(name, module, columns, means[name])
    kept = _stay(weight.shape[0], rows, weight), _stay(weight.shape[1], columns, weight)
    new.weight = _parameter(weight.detach().index_select(0, kept[0]).index_select(1, kept[1]), weight)
    cut_bias = None if bias is None else _parameter(bias.detach().index_select(0, kept[0]), bias)
    new.register_parameter("bias", cut_bias)
    sides = (
        ("out_features", "in_features") if isinstance(module, nn.Linear) else ("out_channels", "in_channels")
    )
    for side, indices in zip(sides, kept, strict=True):
        setattr(new, side, len(indices))
    return new


def _narrow_follower(module: nn.Module, new: nn.Module, gone: set[int]) -> None:
    """Cut every tensor of a module that has entries of each channel."""
    count = _sizes(module)["channels"]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        more = module.out_channels // module.in_channels
        for attribute, times in (("in_channels", 1), ("groups", 1), ("out_channels", more)):
            setattr(new, attribute, times * (count - len(gone)))
        gone, count = {channel * more + i for channel in gone for i in range(more)}, module.out_channels
        axes = dict.fromkeys(own_tensors(module), 0)
    else:
        axes = vectors_of(module)
        for attribute in ("num_features", "num_parameters"):
            if getattr(module, attribute, None) == count:
                setattr(new, attribute, count - len(gone))
    for name, tensor in own_tensors(module).items():
        cut = tensor.detach().clone()  # the count of batches is a single number
        if name in axes:
            cut = cut.index_select(axes[name], _stay(count, gone, tensor))
        if name in module._parameters:
            new._parameters[name] = _parameter(cut, tensor)
        else:
            new._buffers[name] = cut


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _folded(
    name: str,
    module: rewrite.Dense,
    gone: set[int],  # columns
    mean: Tensor,  # [in] or [in prod(kernel)]
) -> Tensor:  # [out]
    """Return the bias with what the columns that go give on average."""
    weight = (
        module.weight.detach().flatten(2) if module.weight.ndim > 2 else module.weight.detach()[..., None]
    )
    reads, kernel = weight.shape[1:]
    if mean.shape not in ((reads,), (reads * kernel,)):
        raise PlanError(f"means of {name!r} must be [{reads}] or [{reads * kernel}], got {list(mean.shape)}")
    each = mean.to(weight.device, torch.float64).reshape(reads, -1).expand(-1, kernel)
    lost = torch.tensor(sorted(gone), dtype=torch.int64, device=weight.device)
    shift = torch.einsum("ock,ck->o", weight.double()[:, lost], each[lost])
    if module.bias is not None:
        return _parameter((module.bias.detach().double() + shift).to(weight.dtype), module.bias)
    return _parameter(shift.to(weight.dtype), module.weight)


def _selecting(layer: nn.Module, removal: Removal) -> SelectInputs:
    """Put the selection of the network's inputs in front of a layer that was narrowed to it."""
    assert isinstance(layer, rewrite.Dense)
    return SelectInputs(layer, removal.kept, device=layer.weight.device).train(layer.training)
