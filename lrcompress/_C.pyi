from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    cuda: bool
    cuda_archs: list[str]
    nvcc: str | None
    compiler: str
    openmp: bool

MAX_CUDA_SIDE: int

def build_info() -> BuildInfo: ...
def gram_tiles(side: int) -> int: ...
def gram(problems: Tensor, out: Tensor, tiles: int, bits: int, threads: int) -> None: ...
def group_lasso(
    curvature: Tensor,
    linear: Tensor,
    weight: Tensor | None,
    starts: Tensor,
    thresholds: Tensor,
    energy: float,
    tol: float,
    max_sweeps: int,
    max_work: float,
    solution: Tensor,
    gradient: Tensor,
    threads: int,
) -> tuple[float, float, int, int]: ...
def lowrank_conv2d(
    input: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int,
) -> None: ...
def symmetric_eigenvalues(
    matrices: Tensor, problems: Tensor, values: Tensor, max_side: int, threads: int
) -> None: ...
