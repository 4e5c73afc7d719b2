"""Accelerated proximal gradient for the group lasso, many penalties at once."""

from contextlib import nullcontext

import torch
from torch import Tensor

from lrcompress import _C
from lrcompress.ops._groups import Problem

# Iterations between two looks at what still runs, each of which waits for the device. Even, so that a CUDA
# graph of as many ends where it began: with the iterate in the first of two buffers.
LOOK_EVERY = 10
# Of a penalty: growth and beta of the momentum, objective, gap; and iterations, running, ticket.
MOMENTUM = (1.0, 0.0, 0.0, 0.0)
STATE = (0, 1, 0)


class Iteration:
    """The iterates of all penalties, [rows, penalties, outputs] in two buffers that take turns.

    An iteration is one product with the curvature, a library call, and one fused kernel. The product of the
    extrapolated point is extrapolated too, so that of the iterate gives the duality gap for nothing. A
    penalty that has converged stays where it is.
    """

    def __init__(
        self,
        problem: Problem,
        thresholds: Tensor,  # [penalties, groups], > 0
        tol: float,  # on the duality gap over the objective
        lipschitz: float,  # at least the largest eigenvalue of the curvature
        start: Tensor,  # [rows, outputs]
    ) -> None:
        """Allocate all that the iterations need."""
        self.problem, self.thresholds = problem, thresholds
        self.tol, self.step = tol, 1 / lipschitz
        penalties, groups = thresholds.shape
        first = start[:, None].repeat(1, penalties, 1)
        self.buffers = [first, first.clone()]
        self.products = [torch.zeros_like(first), torch.zeros_like(first)]
        self.terms = first.new_empty(penalties, groups, _C.STEP_TERMS)
        self.momentum = first.new_tensor(MOMENTUM).repeat(penalties, 1)
        self.state = torch.tensor(STATE, device=first.device).repeat(penalties, 1)

    def run(self, number: int) -> None:
        """Run iteration ``number``: measure the iterate in its buffer, and write the next to the other."""
        now, other = number % 2, 1 - number % 2
        torch.mm(self.problem.curvature, self.buffers[now].flatten(1), out=self.products[now].flatten(1))
        _C.group_lasso_step(
            (self.buffers[now], self.buffers[other]),
            (self.products[now], self.products[other]),
            self.problem.linear,
            self.problem.weight,
            self.problem.starts,
            self.thresholds,
            self.problem.energy,
            self.step,
            self.tol,
            self.terms,
            self.momentum,
            self.state,
            torch.get_num_threads(),
        )

    def running(self) -> bool:
        """Say whether a penalty has not converged; waits for the device."""
        return bool(self.state[:, 1].any())

    def captured(self) -> torch.cuda.CUDAGraph:
        """Return a graph of iterations 0 to LOOK_EVERY - 1, which has run none of them."""
        kept = [tensor.clone() for tensor in self._changed()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate on their first call, which no graph may hold
            self.run(0)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(self._changed(), kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(LOOK_EVERY):
                self.run(number)
        return graph

    def _changed(self) -> list[Tensor]:
        return [*self.buffers, *self.products, self.momentum, self.state]

    def found(self, max_iter: int) -> tuple[Tensor, Tensor]:
        """Return the solutions [penalties, rows, outputs], and their iterations [penalties]."""
        iterations = self.state[:, 0].clamp(max=max_iter)
        even = (iterations % 2 == 0)[None, :, None]
        return torch.where(even, self.buffers[0], self.buffers[1]).transpose(0, 1).contiguous(), iterations


def fista(
    problem: Problem,
    thresholds: Tensor,  # [penalties, groups], > 0
    tol: float,  # on the duality gap over the objective
    max_iter: int,
    lipschitz: float,  # at least the largest eigenvalue of the curvature
    start: Tensor,  # [rows, outputs]
) -> tuple[Tensor, Tensor]:  # [penalties, rows, outputs]; iterations int64 [penalties]
    """Minimise for each penalty, with momentum that restarts when it points uphill.

    On a GPU the iterations are replays of a CUDA graph.
    Source: Beck and Teboulle (2009), eq. 4.1-4.3; O'Donoghue and Candes (2015), the gradient scheme.
    """
    with torch.cuda.device(start.device) if start.is_cuda else nullcontext():
        iteration = Iteration(problem, thresholds, tol, lipschitz, start)
        number = 0  # up to max_iter, whose step does not count: it says where the last one led
        if start.is_cuda and max_iter + 1 >= LOOK_EVERY:
            graph = iteration.captured()
            while number + LOOK_EVERY <= max_iter + 1 and iteration.running():
                graph.replay()
                number += LOOK_EVERY
        while number <= max_iter and iteration.running():
            iteration.run(number)
            number += 1
        return iteration.found(max_iter)


def duality_gap(
    residual: Tensor,  # E|y - M x|^2, [penalties]
    aligned: Tensor,  # E<y - M x, y>, [penalties]
    penalty: Tensor,  # sum of thresholds times norms, [penalties]
    slopes: Tensor,  # norms of the gradient's groups, [penalties, groups]
    thresholds: Tensor,  # [penalties, groups]
) -> Tensor:  # [penalties]
    """Return the gap to the residual as a dual point, scaled until no group's slope exceeds its threshold."""
    tiny = torch.finfo(residual.dtype).tiny
    feasible = (thresholds / slopes.clamp(min=tiny)).amin(1).clamp(max=1)
    scale = torch.minimum((aligned / residual.clamp(min=tiny)).clamp(min=0), feasible)
    return (residual / 2 + penalty - scale * aligned + scale.square() * residual / 2).clamp(min=0)
