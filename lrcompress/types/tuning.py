"""What was measured on one device, and chosen: the way in which each factored layer runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lrcompress.types.errors import PlanError
from lrcompress.types.plain import from_plain, to_plain

WAYS = ("auto", "fused", "composed", "merged")
FORMATS = ("as given", "contiguous", "channels_last")


@dataclass(frozen=True)
class LayerTuning:
    """One factored layer: seconds of its calls in one forward of the model, and the way chosen."""

    name: str
    choice: str  # "fused", "composed", "merged", or "auto": the layer's own rule
    fused: float  # nan: no fused kernel takes these calls
    composed: float  # two library calls
    merged: float  # one dense layer

    def __post_init__(self) -> None:
        if self.choice not in WAYS:
            raise PlanError(f"the choice of layer {self.name!r} must be one of {WAYS}, got {self.choice!r}")


@dataclass(frozen=True)
class Tuning:
    """The ways chosen for all factored layers of a model, for one device and shape of inputs."""

    device: str
    threads: int  # of the CPU
    inputs: str  # shapes and dtypes of what was run
    memory_format: str  # of all weights; "as given": nothing measured faster than the model as it was
    before: float  # seconds of the model as it was given
    after: float  # seconds of the model as tuned
    layers: tuple[LayerTuning, ...]

    def __post_init__(self) -> None:
        if self.memory_format not in FORMATS:
            raise PlanError(f"memory_format must be one of {FORMATS}, got {self.memory_format!r}")

    @property
    def choices(self) -> dict[str, str]:
        """The way chosen for each layer."""
        return {layer.name: layer.choice for layer in self.layers}

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON; ``Tuning.from_dict`` reads them back."""
        plain: dict[str, object] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, plain: object) -> Tuning:
        """Read a tuning back.

        Raises:
            PlanError: not what ``to_dict`` returns; the message names the field.
        """
        tuning: Tuning = from_plain(cls, plain, "tuning")
        return tuning

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        ways = ("fused", "composed", "merged")
        rows = [f"{'layer':<{width}}  " + " ".join(f"{f'{way} us':>12}" for way in ways) + "  choice"]
        for layer in self.layers:
            texts = [f"{1e6 * getattr(layer, way):.1f}" for way in ways]
            cells = " ".join(f"{'-' if text == 'nan' else text:>12}" for text in texts)
            rows.append(f"{layer.name:<{width}}  {cells}  {layer.choice}")
        gain = self.before / self.after if self.after else math.nan
        rows.append(
            f"model: {1e3 * self.before:.3f} -> {1e3 * self.after:.3f} ms ({gain:.2f} times faster), "
            f"weights {self.memory_format}"
        )
        return "\n".join([f"{self.device}, {self.threads} threads, {self.inputs}", *rows])
