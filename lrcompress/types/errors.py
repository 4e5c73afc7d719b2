"""Every error that a caller can cause and mend."""


class CompressionError(ValueError):
    """The base of the errors below."""


class BudgetError(CompressionError):
    """A budget that makes no sense, or that no choice of options can meet."""


class PlanError(CompressionError):
    """A plan that does not fit the model, or is not a plan."""


class WeightError(CompressionError):
    """A weight that cannot be factorised: not finite, or without data (meta device)."""


class FormatError(CompressionError):
    """An artefact that is incomplete, damaged, or not ours."""
