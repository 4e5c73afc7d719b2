"""What compression changed, measured on the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompress.types.plain import to_plain


@dataclass(frozen=True)
class LayerCheck:
    """One replaced layer, run on the inputs that the original layer saw."""

    name: str
    kind: str
    params_before: int
    params_after: int
    output_error: float  # |compressed(x) - original(x)| / |original(x)|, Frobenius; nan: did not run


@dataclass(frozen=True)
class Verification:
    """The compressed model against the original one on the same inputs."""

    samples: int
    output_error: float  # |compressed(x) - original(x)| / |original(x)|, Frobenius, over all outputs
    max_difference: float  # largest absolute difference of an output
    agreement: (
        float | None
    )  # fraction of equal argmax over the last axis; None unless outputs are [batch, classes]
    params_before: int
    params_after: int
    macs_before: int  # for one sample
    macs_after: int
    layers: tuple[LayerCheck, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as plain dicts and lists, ready for JSON."""
        plain: dict[str, object] = to_plain(self)
        return plain

    def __str__(self) -> str:
        params = self.params_after / max(self.params_before, 1)
        macs = self.macs_after / max(self.macs_before, 1)
        lines = [
            f"params {self.params_before} -> {self.params_after} ({params:.3f}), "
            f"macs {self.macs_before} -> {self.macs_after} ({macs:.3f})",
            f"output error {self.output_error:.4f}, largest difference {self.max_difference:.4g}, "
            f"{self.samples} samples",
        ]
        if self.agreement is not None:
            lines.append(f"same argmax on {self.agreement:.1%}")
        lines += [f"  {c.name} ({c.kind}): output error {c.output_error:.4f}" for c in self.layers]
        return "\n".join(lines)
