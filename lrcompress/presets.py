"""Published methods as compositions of a local and a global step."""

from lrcompress.allocate import ConstantRatio, MinMax, WeightedSum
from lrcompress.factorize import ErrorKind, GroupedSVD
from lrcompress.types import Chaining, Recipe, Reconstruction


def alds(
    error: ErrorKind = "released",
    schemes: tuple[int, ...] = (0,),
    groups: tuple[int, ...] | None = None,  # None: every divisor of a layer's input channels
) -> Recipe:
    """Return ALDS: grouped SVD, group counts and ranks of least maximal error.

    Source: Liebenwein et al. 2021.
    """
    return Recipe("alds", GroupedSVD(error, schemes, groups), MinMax())


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


def lnr(chaining: Chaining = "bottom-up+top-down", debias: bool = True) -> Reconstruction:
    """Return Linear Neural Reconstruction: group lasso removes neurons, least squares makes up for them.

    Source: Robin and Jain.
    """
    return Reconstruction(chaining, debias)
