"""Input channels that a layer can do without: the group-lasso path, refitted by least squares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lrcompress import ops

_AT_ONCE = 6  # penalties that are solved before asking whether the path has gone far enough

_TOL = 1e-3  # relative duality gap at which a support is read off: the refit forgets the shrinkage


class Consumer(NamedTuple):
    """A layer that reads the channels, centred: what its columns of them have to give."""

    xx: Tensor  # float64 [d, d], covariance of the columns' inputs
    yx: Tensor  # float64 [out, d], covariance of the outputs wanted of them and their inputs
    yy: float  # variance of those outputs, summed
    scale: float  # variance of all that the layer gives, summed
    channel: Tensor  # int64 [d], the channel of each column


@dataclass(frozen=True)
class ColumnProblem:
    """Centred second moments around the channels of one coupling, in units of the outputs' variance."""

    xx: Tensor  # float64 [d, d], covariance of the inputs
    yx: Tensor  # float64 [out, d], covariance of wanted outputs and inputs
    yy: float  # variance of the wanted outputs
    channel: Tensor  # int64 [d], the channel that each column belongs to
    channels: int

    def error(self, kept: Sequence[int]) -> float:
        """Return the variance of the outputs that the kept channels cannot give."""
        columns = torch.isin(self.channel, torch.tensor(kept))
        return max(0.0, self.yy - ops.explained(self.xx[columns][:, columns], self.yx[:, columns]))


def problem_of(consumers: Sequence[Consumer], channels: int) -> ColumnProblem:
    """Put the consumers of a coupling side by side, each scaled to outputs of unit variance.

    Their moments are the blocks of block-diagonal ones: one group lasso then penalises the columns of a
    channel in all of them together.
    """
    scales = [1 / max(consumer.scale, 1e-300) for consumer in consumers]
    return ColumnProblem(
        torch.block_diag(*(consumer.xx for consumer in consumers)),
        torch.block_diag(*(c.yx * math.sqrt(s) for c, s in zip(consumers, scales, strict=True))),
        sum(max(0.0, c.yy) * s for c, s in zip(consumers, scales, strict=True)),
        torch.cat([consumer.channel for consumer in consumers]),
        channels,
    )


@dataclass(frozen=True)
class Support:
    """Channels along the path."""

    kept: tuple[int, ...]  # rising
    error: float  # after the refit: variance of the outputs lost
    penalty: float  # at which the path has it; 0: everything is kept


def refitted(
    weight: Tensor,  # W, [out, d]
    goes: Tensor,  # bool [d]
    xx: Tensor,  # [d, d], covariance of the inputs
    missing: Tensor,  # [out, d], covariance of y - W x and x
    noise: Tensor,  # [d], variances of inputs that say nothing
) -> Tensor:  # [out, d]
    """Return the least-squares weight without some columns: the others give what these gave and is missing.

    Where nothing is missing and nothing goes, W itself comes back.
    """
    kept = ~goes
    lacking = (missing + weight[:, goes] @ xx[goes])[:, kept]
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = weight[:, kept] + ops.least_squares(xx[kept][:, kept] + noise[kept].diag(), lacking)
    return fitted


def supports(problem: ColumnProblem, penalties: int, smallest: float) -> list[Support]:
    """Walk down the penalties from the least that removes everything; return each new support, refitted.

    Channels rise and errors fall along the list; the last support keeps every channel, with error 0.

    Source: Robin and Jain, Linear Neural Reconstruction: group lasso, then debiasing.
    """
    found: dict[int, Support] = {}
    for penalty, norms in _path(problem, penalties, smallest):
        kept = tuple(norms.nonzero().flatten().tolist())
        if 0 < len(kept) < problem.channels and len(kept) not in found:
            found[len(kept)] = Support(kept, problem.error(kept), penalty)
    falling: list[Support] = []
    for count in sorted(found):
        if not falling or found[count].error < falling[-1].error:
            falling.append(found[count])
    return [*falling, Support(tuple(range(problem.channels)), 0.0, 0.0)]


def support_of(problem: ColumnProblem, count: int, penalties: int, smallest: float) -> Support:
    """Return the first support with ``count`` channels; of a larger one, those of largest norm.

    Channels that are zero all along the path are not kept, however few that leaves.
    """
    penalty, norms = 0.0, problem.yx.new_zeros(problem.channels)
    for penalty, norms in _path(problem, penalties, smallest):  # noqa: B007
        if int((norms > 0).sum()) >= count:
            break
    count = max(1, min(count, int((norms > 0).sum())))
    kept = tuple(sorted(norms.argsort(descending=True, stable=True)[:count].tolist()))
    return Support(kept, problem.error(kept), penalty)


def shrunk_columns(
    problem: ColumnProblem,  # of one consumer
    kept: Sequence[int],
    penalty: float,
) -> Tensor:  # [out, d], in the units of the problem
    """Return the group lasso's weight on the kept channels, not refitted."""
    columns = torch.isin(problem.channel, torch.tensor(kept))
    target = (problem.yx[:, columns], problem.yy)
    solved = ops.group_lasso(
        problem.xx[columns][:, columns],
        None,
        penalty,
        groups=problem.channel[columns],
        target=target,
        tol=_TOL,
    )
    weight = torch.zeros_like(problem.yx)
    weight[:, columns] = solved.solution
    return weight


def _path(problem: ColumnProblem, penalties: int, smallest: float) -> Iterator[tuple[float, Tensor]]:
    """Walk the penalties from the largest down, each with the norm of every channel's columns."""
    groups, target = problem.channel, (problem.yx, problem.yy)
    top = ops.penalty_max(problem.xx, None, groups=groups, target=target)
    if top == 0:
        return
    path = [top * smallest ** (i / (penalties - 1)) for i in range(1, penalties)]
    solution = None
    for first in range(0, len(path), _AT_ONCE):
        part = path[first : first + _AT_ONCE]
        solved = ops.group_lasso(
            problem.xx, None, part, groups=groups, target=target, initial=solution, tol=_TOL
        )
        for found in solved:
            squares = found.solution.square().sum(0)
            yield found.penalty, squares.new_zeros(problem.channels).index_add(0, groups, squares).sqrt()
        solution = solved[-1].solution
