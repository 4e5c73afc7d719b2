"""Second moments of every layer's inputs, collected from unlabelled batches."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import hooks

from lrcompress import ops
from lrcompress.calibrate import store
from lrcompress.calibrate.follow import Behind, what_follows
from lrcompress.calibrate.run import inference, observed
from lrcompress.calibrate.values import run, tensors_in
from lrcompress.types import CompressionError, PlanError
from lrcompress.types.statistics import LayerStatistics

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Loss = Callable[[Any], Tensor]  # a model's outputs -> scalar

# Units in the last place by which E[x^2] may be wrong: products are added up in runs of 4096, and the errors
# of a run grow with the root of its length.
_ROUNDING = 32


@dataclass(frozen=True)
class Statistics:
    """What ``collect`` found, by layer; a value that can be saved, merged and reduced over processes."""

    layers: Mapping[str, LayerStatistics]
    fingerprint: str  # of the layers' names and weights
    batches: int = 0
    unreached: tuple[str, ...] = field(default=())  # layers that no batch ran

    def merge(self, *others: Statistics) -> Statistics:
        """Return the statistics of all batches together.

        Raises:
            PlanError: they are of another model; both fingerprints are named.
        """
        for other in others:
            if other.fingerprint != self.fingerprint:
                raise PlanError(
                    f"statistics must be of one model, {self.fingerprint!r}, got {other.fingerprint!r}"
                )
        every = (self, *others)
        names = dict.fromkeys(name for each in every for name in each.layers)
        merged = {name: _mean([s.layers[name] for s in every if name in s.layers]) for name in names}
        unreached = tuple(name for name in self.unreached if name not in merged)
        return Statistics(merged, self.fingerprint, sum(s.batches for s in every), unreached)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Statistics:
        """Return the statistics of all processes of a ``torch.distributed`` group; every process must call.

        Raises:
            PlanError: a process collected another model.
        """
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, self, group)
        first: Statistics = gathered[0]
        return first.merge(*gathered[1:])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a checksum, in the place of one that is there in one step."""
        store.save(Path(path), self.layers, self.fingerprint, self.batches, self.unreached)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            FormatError: not such a file, or one that was damaged.
        """
        return cls(**store.load(Path(path)))


class CollectionInterrupted(CompressionError):
    """Collecting stopped midway; ``statistics`` holds the batches before, for ``collect(..., into=)``."""

    def __init__(self, message: str, statistics: Statistics) -> None:
        super().__init__(message)
        self.statistics = statistics


def _mean(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Average, weighted by samples."""
    total = sum(part.samples for part in parts)

    def average(values: list[Tensor]) -> Tensor:
        terms = [v * (part.samples / total) for v, part in zip(values, parts, strict=True)]
        return torch.stack(terms).sum(0) if len(terms) > 1 else values[0]

    gradients = [part.gradient for part in parts if part.gradient is not None]
    return LayerStatistics(
        average([part.autocorrelation for part in parts]),
        average([part.mean for part in parts]),
        total,
        average(gradients) if len(gradients) == len(parts) else None,
        sum(part.share * part.samples for part in parts) / total,
    )


def fingerprint(layers: Mapping[str, Layer]) -> str:
    """Return a digest of the layers' names, shapes and weights."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def collect_layers(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Any],
    *,
    transform: Callable[[Any], Any] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    gradients: bool,
    loss: Loss | None,
    memory: int | None,
    into: Statistics | None,
    progress: Callable[[int], None] | None,
) -> Statistics:
    """Collect the statistics of the given layers; see ``lrcompress.collect``."""
    mark = fingerprint(layers)
    if into is not None and into.fingerprint != mark:
        raise PlanError(f"statistics must be of this model, {mark!r}, got {into.fingerprint!r}")
    subsets = _subsets(layers, gradients, memory)
    if len(subsets) > 1 and isinstance(batches, Iterator):
        raise CompressionError(
            f"memory={memory} takes {len(subsets)} passes over the batches: give a list or a loader, "
            "got an iterator, which can be read once"
        )
    found: dict[str, LayerStatistics] = {}
    seen = 0
    step = partial(run_batch, model, transform, forward)
    for subset in subsets:
        sums, seen = _Sums(subset), 0
        try:
            for batch in batches:
                _one_batch(model, sums, step, batch, gradients, loss)
                sums.keep()
                if not seen:
                    sums.behind = what_follows(model, subset, partial(step, batch), batch)
                seen += 1
                if progress is not None:
                    progress(seen)
        except Exception as error:
            partial_result = _with(into, Statistics(found | sums.means(), mark, seen))
            raise CollectionInterrupted(
                f"batch {seen}: {error}; {seen} batches before it are kept in this error's statistics",
                partial_result,
            ) from error
        found |= sums.means()
    if not seen and into is None:
        raise CompressionError("batches must hold at least one batch, got none")
    result = _with(into, Statistics(found, mark, seen))
    return Statistics(
        result.layers, mark, result.batches, tuple(name for name in layers if name not in result.layers)
    )


def _with(before: Statistics | None, found: Statistics) -> Statistics:
    return found if before is None else before.merge(found)


def _subsets(layers: Mapping[str, Layer], gradients: bool, memory: int | None) -> list[dict[str, Layer]]:
    """Cut the layers into runs whose statistics fit the memory together."""
    subsets: list[dict[str, Layer]] = [{}]
    used = 0
    for name, layer in layers.items():
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        size = 8 * groups * layer.weight[0].numel() ** 2 + 8 * gradients * layer.weight.shape[0] ** 2
        if memory is not None and subsets[-1] and used + size > memory:
            subsets.append({})
            used = 0
        subsets[-1][name] = layer
        used += size
    return subsets


def run_batch(
    model: nn.Module,
    transform: Callable[[Any], Any] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    batch: Any,
) -> Any:
    """Run a model on a batch as ``collect`` was told to."""
    inputs = batch if transform is None else transform(batch)
    return run(model, inputs) if forward is None else forward(model, inputs)


class _Sums:
    """Running sums of some layers; those of a batch are kept once it is whole."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.layers = layers
        self.behind: dict[str, Behind] = {}
        self.inputs: dict[str, ops.Autocorrelation] = {}  # of whole batches
        self.gradients: dict[str, ops.Autocorrelation] = {}
        self.new_inputs: dict[str, ops.Autocorrelation] = {}  # of the batch that runs
        self.new_gradients: dict[str, ops.Autocorrelation] = {}

    def keep(self) -> None:
        """Add the batch that ran."""
        for totals, new in ((self.inputs, self.new_inputs), (self.gradients, self.new_gradients)):
            for name, part in new.items():
                if not part.count:
                    continue
                known = totals.get(name)
                if known is None:
                    totals[name] = part
                    continue
                known.products.add_(part.products)
                known.sums.add_(part.sums)
                totals[name] = known._replace(count=known.count + part.count)
                part.products.zero_()  # for the next batch: fresh memory takes many times as long
                part.sums.zero_()
                new[name] = part._replace(count=0)
            for name in [name for name, part in new.items() if part.count]:
                del new[name]  # it has become the total

    def see(self, name: str, x: Tensor, _: Tensor) -> None:
        """Add a call's inputs."""
        if not x.isfinite().all():
            raise CompressionError(f"the inputs of layer {name!r} hold nan or infinity")
        layer = self.layers[name]
        geometry: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            kept = ("stride", "padding", "dilation", "groups", "padding_mode")
            geometry = {"kernel": layer.kernel_size} | {key: getattr(layer, key) for key in kept}
        known = self.new_inputs.get(name)
        self.new_inputs[name] = ops.autocorrelation(x.detach(), **geometry, into=known)

    def see_gradient(self, name: str, g: Tensor) -> None:
        """Add the gradient of a call's outputs."""
        spatial = self.layers[name].weight.ndim - 2
        rows = g if spatial == 0 else g.movedim(-1 - spatial, -1)
        known = self.new_gradients.get(name)
        self.new_gradients[name] = ops.autocorrelation(rows.detach(), into=known)

    def means(self) -> dict[str, LayerStatistics]:
        """Return the averages of the layers that ran."""
        return {
            name: LayerStatistics(
                _settled(total, self.layers[name].weight.dtype),
                (total.sums / total.count).cpu(),
                total.count,
                (self.gradients[name].products[0] / total.count).cpu() if name in self.gradients else None,
                self.behind[name].share if name in self.behind else 1.0,
            )
            for name, total in self.inputs.items()
            if total.count
        }


def _settled(total: ops.Autocorrelation, dtype: torch.dtype) -> Tensor:  # [conv_groups, d, d]
    """Return E[x x^T] with exactly E[x] E[x]^T for inputs whose variance is lost in rounding: constants.

    In place: the sums are as large as the result, and nobody reads them again.
    """
    products, means = total.products.div_(total.count), total.sums / total.count
    power = products.diagonal(dim1=1, dim2=2)
    rounding = _ROUNDING * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    constant = power - means.square() <= rounding * power
    for matrix, mean, fixed in zip(products, means, constant, strict=True):
        if fixed.any():
            rows = mean[fixed, None] * mean
            matrix[fixed] = rows
            matrix[:, fixed] = rows.T
    return products.cpu()


def _one_batch(
    model: nn.Module,
    sums: _Sums,
    step: Callable[[Any], Any],
    batch: Any,
    gradients: bool,
    loss: Loss | None,
) -> None:
    """Run a batch, and its backward pass where gradients are wanted."""
    if not gradients:
        with inference(model, batch), observed(sums.layers, sums.see):
            step(batch)
        return
    with _differentiable(model, batch), observed(sums.layers, sums.see), _observed_gradients(sums):
        outputs = step(batch)
        target = sampled_loss(outputs) if loss is None else loss(outputs)
        torch.autograd.grad(target, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@contextlib.contextmanager
def _differentiable(model: nn.Module, batch: Any) -> Iterator[None]:
    """Run in evaluation mode with gradients."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    with inference(model, batch), torch.enable_grad():
        for p, _ in wanted:
            p.requires_grad_(p.is_floating_point())
        try:
            yield
        finally:
            for p, flag in wanted:
                p.requires_grad_(flag)


@contextlib.contextmanager
def _observed_gradients(sums: _Sums) -> Iterator[None]:
    """Hook the outputs of the layers, so that their gradients are seen in the backward pass."""
    handles: list[hooks.RemovableHandle] = []

    def see(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            handles.append(output.register_hook(partial(sums.see_gradient, name)))

    try:
        for name, layer in sums.layers.items():
            handles.append(layer.register_forward_hook(partial(see, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def sampled_loss(outputs: Any) -> Tensor:
    """Return a loss whose gradients' second moment is the Fisher information of the outputs.

    Where there is one [batch, classes] output, labels are drawn from its softmax; else every output is the
    mean of a Gaussian of unit variance. Drawn with a fixed seed.
    """
    leaves = [leaf for _, leaf in tensors_in(outputs) if leaf.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    if len(leaves) == 1 and leaves[0].ndim == 2 and leaves[0].shape[1] > 1:
        shares = leaves[0].detach().float().cpu().softmax(1)
        labels = torch.multinomial(shares, 1, generator=generator)[:, 0].to(leaves[0].device)
        return nn.functional.cross_entropy(leaves[0], labels, reduction="sum")
    return torch.stack(
        [(leaf * torch.randn(leaf.shape, generator=generator).to(leaf)).sum() for leaf in leaves]
    ).sum()
