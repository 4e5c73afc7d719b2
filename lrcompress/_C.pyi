from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    cuda: bool
    cuda_archs: list[str]
    nvcc: str | None
    compiler: str
    openmp: bool
    amx: bool

MAX_CUDA_SIDE: int
MAX_CUDA_ROWS: int
STEP_TERMS: int

def build_info() -> BuildInfo: ...
def autocorrelation(
    x: int,
    bits: int,
    shape: Sequence[int],
    strides: Sequence[int],
    step: Sequence[int],
    tables: Sequence[Tensor],
    products: Tensor,
    sums: Tensor,
    threads: int,
) -> None: ...
def autocorrelation_round(
    x: int,
    dtype: str,
    shape: Sequence[int],
    strides: Sequence[int],
    step: Sequence[int],
    tables: Sequence[Tensor],
    products: Tensor,
    round: Sequence[int],
    splits: int,
    workspace: Tensor,
) -> None: ...
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
def group_lasso_step(
    buffers: Sequence[Tensor],
    products: Sequence[Tensor],
    linear: Tensor,
    weight: Tensor | None,
    starts: Tensor,
    thresholds: Tensor,
    energy: float,
    step: float,
    tol: float,
    terms: Tensor,
    momentum: Tensor,
    state: Tensor,
    threads: int,
) -> None: ...
def group_lasso_certificate(
    solution: Tensor,
    gradient: Tensor,
    target: Tensor,
    is_weight: bool,
    energy: float,
    group: Tensor,
    thresholds: Tensor,
    certificates: Tensor,
    threads: int,
) -> None: ...

class PackedFactors:
    def __init__(self) -> None: ...

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
    activation: int,
    channels_last: bool,
    encoder_last: bool,
    threads: int,
    packed: PackedFactors | None = ...,
    tile: Sequence[int] = ...,
    algorithm: int = ...,  # 0 the faster one, 1 direct sums, 2 Winograd's
) -> None: ...
def lowrank_linear(
    input: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    out: Tensor,
    hidden: Tensor,
    groups: int,
    activation: int,
    threads: int,
    tile: Sequence[int] = ...,
) -> None: ...
def linear_takes_many_rows(rows: int, rank: int, inside: int) -> bool: ...
def linear_hidden_size(rows: int, groups: int, rank: int, inside: int) -> int: ...
def lowrank_tile(
    pixels: int, groups: int, rank: int, entry_bytes: int, shared_limit: int, multiprocessors: int
) -> list[int]: ...
def symmetric_eigenvalues(
    matrices: Tensor, problems: Tensor, values: Tensor, max_side: int, threads: int
) -> None: ...
