"""What a layer can take in: the batch norm and the activation behind it."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompress.types.plan import LeftAlone


@dataclass(frozen=True)
class Uses:
    """Who read the output tensor of a module, and its own tensors, in one forward of the model."""

    calls: int  # of the module
    axes: int  # of its output
    readers: tuple[str, ...]  # modules followed that were given the output
    others: tuple[str, ...] = ()  # what else read or kept the output
    own: tuple[str, ...] = ()  # what else read the module's parameters or buffers


@dataclass(frozen=True)
class Fold:
    """One layer and the modules that become part of it."""

    layer: str
    norm: str | None
    activation: str | None

    @property
    def gone(self) -> tuple[str, ...]:
        """Modules that only pass on what they get once they are folded in."""
        return tuple(name for name in (self.norm, self.activation) if name is not None)


@dataclass(frozen=True)
class Folding:
    """All folds of a model, and the batch norms and activations that stay modules."""

    folds: tuple[Fold, ...]
    left_alone: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        rows = [f"{fold.layer}: {' and '.join(fold.gone)}" for fold in self.folds]
        rows += [f"left alone: {item.name} ({item.kind}): {item.reason}" for item in self.left_alone]
        return "\n".join(rows)
