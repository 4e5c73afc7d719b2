"""Every error that a caller can cause and mend."""

from __future__ import annotations

# Bytes of a message: names and numbers in it come from files and models, and may be of any length.
_LONGEST, _TAIL = 1900, 500


class CompressionError(ValueError):
    """The base of the errors below. A message above 1.9 kB loses its middle."""

    def __init__(self, *values: object) -> None:
        super().__init__(*(_shortened(value) if isinstance(value, str) else value for value in values))


class BudgetError(CompressionError):
    """A budget that makes no sense, or that no choice of options can meet."""


class PlanError(CompressionError):
    """A plan that does not fit the model, or is not a plan."""


class WeightError(CompressionError):
    """A weight that cannot be factorised or stored: not finite, without data, or of a type of its own."""


class FormatError(CompressionError):
    """An artefact that is incomplete, damaged, or not ours."""


def _shortened(message: str) -> str:
    raw = message.encode("utf-8", "backslashreplace")
    if len(raw) <= _LONGEST:
        return message
    head, tail = raw[: _LONGEST - _TAIL - 5], raw[-_TAIL:]
    return f"{head.decode('utf-8', 'ignore')} ... {tail.decode('utf-8', 'ignore')}"
