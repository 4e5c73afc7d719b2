"""What becomes of layers' outputs: batch norms and residual sums, found while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lrcompress.calibrate.run import inference, observed

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_PICKS = frozenset(("__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "take"))
_PUTS = ("index_add", "index_copy", "index_put", "scatter", "masked_scatter")  # and what begins like these
_SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))


@dataclass(frozen=True)
class Behind:
    """What the outputs of a layer go through.

    A layer is in the branch that ends at the first sum of two tensors of one shape that its outputs reach on
    one side alone. The other side must come from a layer or an embedding too: a mask ends no branch.
    """

    norm: str | None = None  # the batch norm that reads the output tensor itself; both run once
    share: float = 1.0  # variance of the layer's branch over the variance of the sum; 1 outside of branches
    chosen: bool = False  # the rows that it gets are picked by what layers before it give, as by a router


def what_follows(
    model: nn.Module,
    layers: Mapping[str, Layer],
    run: Callable[[], Any],  # runs the model once
    inputs: Any = None,  # which the model may write to
) -> dict[str, Behind]:
    """Follow the outputs of each layer through whatever torch calls; of layers that run."""
    path = _Path(layers)
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (isinstance(module, _BatchNorm) and module.track_running_stats)
    }
    with inference(model, inputs), path, observed({**layers, **others}, path.leave):
        run()
    once = {name for name, count in path.calls.items() if count == 1}
    norms = {layer: norm for layer, norm in path.norms.items() if {layer, norm} <= once}
    return {
        name: Behind(norms.get(name), path.shares.get(name, 1.0), name in path.chosen)
        for name in layers
        if name in path.calls
    }


def _terms(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """Return what a call of torch adds up, if it is two tensors of one shape."""
    if getattr(func, "__name__", "") not in _SUMS or len(args) != 2 or kwargs:
        return None
    a, b = args
    alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a is not b
    return (a, b) if alike else None


class _Path(TorchFunctionMode):
    """Knows of every tensor which layers it comes from since the last sum."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.norms: dict[str, str] = {}  # layer -> batch norm
        self.shares: dict[str, float] = {}
        self.chosen: set[str] = set()  # modules
        self._layers = layers
        self._sources: Any = WeakTensorKeyDictionary()  # tensor -> names of layers
        self._made: Any = WeakTensorKeyDictionary()  # output -> its layer, and its version
        self._picked: Any = WeakTensorKeyDictionary()  # tensors of rows that layers' outputs picked

    def leave(self, name: str, x: Tensor, y: Tensor) -> None:
        """Take note of a module's output."""
        self.calls[name] += 1
        if x in self._picked:
            self.chosen.add(name)
        own = {name} & self._layers.keys()
        self._sources[y] = self._sources.get(y, frozenset()) | own
        if own:
            self._made[y] = (name, y._version)
        elif x in self._made:
            layer, version = self._made[x]
            if x._version == version and x.ndim == self._layers[layer].weight.ndim:
                self.norms[layer] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if getattr(func, "__name__", "").endswith(("_as", "_like")):
            given = given[:-1]  # the last argument gives its shape alone
        known = [self._sources[leaf] for leaf in given if leaf in self._sources]
        terms = _terms(func, args, kwargs)
        ends = terms is not None and len(known) == 2
        held = [term.detach().clone() for term in terms] if terms is not None and ends else []
        result = func(*args, **kwargs)
        sources = frozenset().union(*known)
        if terms is not None and ends:
            self._end(terms, held, result.detach())
            sources = frozenset()
        picked = self._picks(getattr(func, "__name__", ""), args, given)
        for leaf in tree_leaves(result) if known else ():
            if isinstance(leaf, Tensor):
                made = all(leaf is not each for each in given)  # perhaps by a layer that the call ran
                own = self._sources.get(leaf, frozenset()) if made else frozenset()
                self._sources[leaf] = sources | own
                if picked:
                    self._picked[leaf] = True
        return result

    def _picks(self, name: str, args: Any, given: list[Tensor]) -> bool:
        """Return whether a call's results are rows that layers' outputs picked, and not put back."""
        if name.startswith(_PUTS):
            return False
        indices = tree_leaves(args[1:]) if name in _PICKS else ()
        by_layers = any(isinstance(leaf, Tensor) and leaf in self._sources for leaf in indices)
        return by_layers or any(leaf in self._picked for leaf in given)

    def _end(self, terms: tuple[Tensor, Tensor], values: list[Tensor], total: Tensor) -> None:
        """Take note of a sum."""
        for term, other, value in zip(terms, reversed(terms), values, strict=True):
            for name in self._sources[term] - self._sources[other]:
                channels = min(self._layers[name].weight.ndim, total.ndim) - 1  # fewer axes: flattened
                whole = _variance(total, channels)
                share = _variance(value, channels) / whole if whole > 0 else 1.0
                self.shares[name] = max(share, self.shares.get(name, 0.0))


def _variance(x: Tensor, channels: int) -> float:
    """Return the sum of the channels' variances; they are that axis, counted from the last."""
    values = x.double().movedim(-channels, 0) if channels > 0 else x.double()[None]
    return float(values.reshape(len(values), -1).var(1, correction=0).sum())
