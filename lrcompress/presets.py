"""Published methods as compositions of a local and a global step."""

from typing import cast, get_args

from lrcompress.allocate import ConstantRatio, MinMax, WeightedSum
from lrcompress.factorize import ActivationAware, ErrorKind, GroupedSVD, OutputError
from lrcompress.types import Chaining, Recipe, Reconstruction


def alds(
    error: ErrorKind | OutputError = "released",
    schemes: tuple[int, ...] = (0,),
    groups: tuple[int, ...] | None = None,  # None: every divisor of a layer's input channels
) -> Recipe:
    """Return ALDS: grouped SVD, group counts and ranks of least maximal error.

    An ``error`` of `ErrorKind` is of the weights; one of `OutputError`, such as "relative", is of the layer's
    outputs and needs statistics. Source: Liebenwein et al. 2021; errors of outputs are ours.
    """
    if error in get_args(OutputError):
        return Recipe("alds", ActivationAware(cast(OutputError, error), schemes, groups), MinMax())
    return Recipe("alds", GroupedSVD(cast(ErrorKind, error), schemes, groups), MinMax())


def svd() -> Recipe:
    """Return plain SVD with the same relative rank in every layer. Source: Denton et al. 2014."""
    return Recipe("svd", GroupedSVD("frobenius", groups=(1,)), ConstantRatio())


def svd_energy() -> Recipe:
    """Return plain SVD with the same relative energy dropped in every layer.

    Source: Alvarez and Salzmann 2017.
    """
    return Recipe("svd_energy", GroupedSVD("frobenius", groups=(1,)), MinMax())


def lrank() -> Recipe:
    """Return the rank choice of L-Rank: least sum of squared errors, without its training.

    Source: Idelbayev and Carreira-Perpinan 2020, the C step.
    """
    return Recipe("lrank", GroupedSVD("squared", groups=(1,)), WeightedSum())


def lnr(
    chaining: Chaining = "bottom-up+top-down",
    debias: bool = True,
    low_rank: Recipe | None = None,  # such as activation_aware(): competes with the removal for the budget
) -> Reconstruction:
    """Return Linear Neural Reconstruction: group lasso removes neurons, least squares makes up for them.

    With ``low_rank`` several splits of the budget between the two are fitted and run on the example inputs:
    give some hundred. The nearest outputs win; ``plan.splits`` has all. They are fitted to ``statistics``
    where given: give none, and all samples as example inputs, where ``apply`` will have batches, because that
    fit makes up for more of what low rank loses than of what removal does.

    Source: Robin and Jain.
    """
    return Reconstruction(chaining, debias, low_rank=low_rank)


def activation_aware(
    error: OutputError = "branch",
    schemes: tuple[int, ...] = (0,),
    groups: tuple[int, ...] | None = None,  # None: every divisor of a layer's input channels
) -> Recipe:
    """Return grouped low rank by the outputs' error after the decoder's refit, least sum over layers.

    Error e = min_D |(W - D E) S^(1/2)|^2 / |W S^(1/2)|^2 with S the inputs' covariance, E the groups' best
    encoders, times the share of the layer's residual branch in its sum. Source: Robin and Jain (outputs on
    real inputs), Liebenwein et al. 2021 (groups); the refit in the error and the share are ours.
    """
    return Recipe("activation_aware", ActivationAware(error, schemes, groups), WeightedSum())


def pca() -> Recipe:
    """Return PCA of the outputs: ranks of largest product over layers of the energies kept.

    W ~ U U^T W, U the leading eigenvectors of W S W^T. Source: Zhang et al. 2015, sections 2.1 and 2.4.
    """
    return Recipe("pca", ActivationAware("energy", groups=(1,), refit=False), WeightedSum())


def svd_llm() -> Recipe:
    """Return SVD of W R^(1/2), R = E[x x^T], at the same relative rank in every layer.

    Source: Wang et al. 2025 (SVD-LLM), truncation-aware whitening.
    """
    step = ActivationAware("absolute", groups=(1,), refit=False, centred=False)
    return Recipe("svd_llm", step, ConstantRatio())


def kfac_svd() -> Recipe:
    """Return SVD of G^(1/2) W R^(1/2), G = E[g g^T], of least sum of second-order losses.

    Needs ``collect(..., gradients=True)``. Source: Martens and Grosse 2015 (the loss model).
    """
    step = ActivationAware("fisher", groups=(1,), refit=False, centred=False)
    return Recipe("kfac_svd", step, WeightedSum())
