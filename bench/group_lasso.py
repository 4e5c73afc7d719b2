"""Group-lasso paths to a certified gap: ours, skglm, celer, scikit-learn, adelie and FISTA, in one run.

python bench/group_lasso.py [--threads 1] [--only 64x64] [--gaps 1e-6] [--json bench/results/group_lasso.json]

20 penalties below penalty_max, where the answer is zero and all time goes into checks, down to a thousandth
of it, each solver warm-started. A point is a penalty, its time that of the path down to it. A solver runs
with its own tolerances 1e-2, 1e-3, ..., and a point counts the fastest of these runs whose answers down to
there all meet the target by our float64 duality gap. Ours includes all checks and certificates. Peers that
want rows get a square root of R and the targets behind it: what making them takes is only in the column that
says so. A peer that takes too long is ended: its time is then more than what it was given.
LRCOMPRESS_DATA adds layers of ResNet20 and the pixels of MNIST before the first layer of LeNet-300-100.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, publish
from group_lasso_peers import MAKERS, Peer, Problem
from torch import Tensor

from lrcompress import ops

TARGETS = (1e-2, 1e-4, 1e-6)
SHARES = torch.logspace(0, -3, 21, dtype=torch.float64)[1:].tolist()
POINTS = (1, 3, 6, 10, 15, 20)  # penalties solved, where all are compared
HALF = len(SHARES) // 2
LADDER = [10.0**-k for k in range(2, 13)]
# Seconds a peer is given: at least these, so many times ours for the sparse half, and more than ours.
LEAST_SECONDS, HALF_PATIENCE, PATIENCE = 0.3, 6.0, 1.3
REPEATED_SECONDS = 0.2  # a path that takes longer, of ours or of a peer, is timed once
MOST_IN_VAIN = 2
IMAGES = 200
Times = dict[float, list[float]]  # of each target: seconds to each of the points, infinite where not reached


def problem(name: str, R: Tensor, weight: Tensor, groups: int) -> Problem:
    """Set the penalties."""
    top = ops.penalty_max(R, weight, groups)
    return Problem(name, R, weight, groups, [top * share for share in SHARES])


def synthetic(out: int, channels: int, area: int) -> Problem:
    """Correlated features behind a ReLU, of different scales."""
    inner, count = channels * area, 4 * channels * area
    hidden = torch.randn(count, inner // 4, dtype=torch.float64) @ torch.randn(
        inner // 4, inner, dtype=torch.float64
    )
    noise = 0.3 * torch.randn(count, inner, dtype=torch.float64)
    x = F.relu((hidden / (inner // 4) ** 0.5 + noise) * 2 * torch.rand(inner, dtype=torch.float64))
    weight = torch.randn(out, inner, dtype=torch.float64) / inner**0.5
    return problem(f"relu-like {out}x{inner}", x.T @ x / count, weight, area)


def real(folder: Path) -> list[Problem]:
    """Layers of the trained ResNet20 on CIFAR-10 images, and MNIST pixels before a random layer."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from resnet20_cifar10 import images, trained

    model = trained(folder)
    inputs: dict[str, Tensor] = {}
    for name in ("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        model(images(folder / "cifar10_train.npz", IMAGES)[0])
    problems = []
    for name, x in inputs.items():
        patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
        weight = model.get_submodule(name).weight.detach().flatten(1).double()
        shape = f"{weight.shape[0]}x{weight.shape[1]}"
        problems.append(problem(f"ResNet20 {name} {shape}", patches.T @ patches / len(patches), weight, 9))
    with np.load(folder / "mnist_t10k.npz") as file:
        pixels = torch.from_numpy(file["images"][:8000]).flatten(1).double() / 255
    weight = torch.randn(300, pixels.shape[1], dtype=torch.float64) / pixels.shape[1] ** 0.5
    return [*problems, problem("MNIST pixels 300x784", pixels.T @ pixels / len(pixels), weight, 1)]


def times_of_ours(given: Problem, gaps: Sequence[float], repeats: int) -> Times:
    """Return the least seconds to each point, checks and certificates included."""
    times: Times = {}
    for target in gaps:
        times[target] = []
        for point in POINTS:
            seconds: list[float] = []
            while len(seconds) < repeats and (not seconds or seconds[0] < REPEATED_SECONDS):
                start = time.perf_counter()
                path = ops.group_lasso(
                    given.R, given.weight, given.penalties[:point], given.groups, tol=target
                )
                seconds.append(time.perf_counter() - start)
                if not all(answer.converged for answer in path):
                    raise RuntimeError(f"{given.name}: an answer does not meet {target:g}")
            times[target].append(min(seconds))
    return times


def limits_of(mine: Times) -> dict[float, float]:
    """Return what a peer is given for each target."""
    half, end = POINTS.index(HALF), POINTS.index(len(SHARES))
    return {
        target: max(LEAST_SECONDS, HALF_PATIENCE * times[half], PATIENCE * times[end])
        for target, times in mine.items()
    }


def times_of_peer(
    peer: Peer, given: Problem, limits: dict[float, float], repeats: int
) -> tuple[Times, float]:
    """Return the least seconds to each point over the peer's tolerances, and those of the preparation."""
    times: Times = {target: [math.inf] * len(POINTS) for target in limits}
    in_vain = 0  # runs in a row that were too slow and gained nothing
    for tol in limits if peer.stops_at_the_gap else LADDER:
        unmet = [target for target in limits if math.inf in times[target]]
        if not unmet or in_vain == MOST_IN_VAIN:
            break
        gained = complete = False
        for _ in range(repeats):
            answers = peer.path(given, tol, max(limits[target] for target in unmet))
            complete = len(answers) == len(SHARES)
            gained = count_answers(given, answers, times) or gained
            if not complete or sum(seconds for seconds, _ in answers) > REPEATED_SECONDS:
                break
        in_vain = 0 if gained or complete else in_vain + 1
    return times, peer.preparation


def count_answers(given: Problem, answers: Sequence[tuple[float, Tensor]], times: Times) -> bool:
    """Lower the times of the points that a run reaches; say whether some had not been reached before."""
    spent, worst, gained = 0.0, 0.0, False
    for k, (seconds, M) in enumerate(answers):
        spent += seconds
        worst = max(worst, given.gap(M, given.penalties[k]))
        for target, mine in times.items():
            if k + 1 in POINTS and worst <= target:
                at = POINTS.index(k + 1)
                gained = gained or math.isinf(mine[at])
                mine[at] = min(mine[at], spent)
    return gained


def ratio(theirs: Sequence[float], mine: float, limit: float) -> float | str:
    """Return the speed-up over the fastest, or its lower bound where none was done within the limit."""
    best = min(theirs, default=math.inf)
    return best / mine if best <= limit else f"> {limit / mine:.3g}"


def value(ratio: float | str) -> float:
    """Return the number."""
    return float(str(ratio).removeprefix("> "))


def compare(
    given: Problem, found: Sequence[Peer], gaps: Sequence[float], repeats: int
) -> list[dict[str, Any]]:
    """Return a row a target and a point."""
    mine = times_of_ours(given, gaps, repeats)
    limits = limits_of(mine)
    able = {
        peer.name: times_of_peer(peer, given, limits, repeats)
        for peer in found
        if peer.installed and (peer.knows_groups or given.groups == 1)
    }
    rows = []
    for target, limit in limits.items():
        for at, point in enumerate(POINTS):
            row: dict[str, Any] = {"problem": given.name, "gap": f"{target:.0e}", "penalties": point}
            row["ours"] = own = mine[target][at]
            for name in MAKERS:
                seconds = able[name][0][target][at] if name in able else None
                row[name] = "-" if seconds is None else seconds if seconds <= limit else f"over {limit:.2g}"
            theirs = [(times[target][at], preparation) for times, preparation in able.values()]
            row["best peer / ours"] = ratio([seconds for seconds, _ in theirs], own, limit)
            # A peer past the limit stays past it.
            with_rows = [s + preparation for s, preparation in theirs if s <= limit]
            row["with rows"] = min(with_rows) / own if with_rows else row["best peer / ours"]
            rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a problem: speed-ups on the sparse half and the whole path, and at the worst point."""
    table = []
    tightest = rows[-1]["gap"]
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        at = {row["penalties"]: row["best peer / ours"] for row in mine if row["gap"] == tightest}
        worst = min(mine, key=lambda row: value(row["best peer / ours"]))
        counted = min(mine, key=lambda row: value(row["with rows"]))
        table.append(
            {
                "speed-up over the best peer": name,
                f"sparse half, {tightest}": at[HALF],
                f"path, {tightest}": at[len(SHARES)],
                "worst point": worst["best peer / ours"],
                "there": f"{worst['penalties']} penalties, {worst['gap']}",
                "worst with rows": counted["with rows"],
            }
        )
    return table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Name what runs only a part."""
    parser.add_argument("--only", default="", help="part of the names of the problems to run")
    parser.add_argument("--gaps", type=float, nargs="+", default=TARGETS)


def main() -> None:
    """Compare on every problem."""
    args = arguments(__doc__ or "", repeats=3, add=add_options)
    problems = [synthetic(64, 64, 1), synthetic(64, 64, 9), synthetic(128, 128, 9)]
    if "LRCOMPRESS_DATA" in os.environ:
        problems += real(Path(os.environ["LRCOMPRESS_DATA"]))
    else:
        print("set LRCOMPRESS_DATA to add layers of ResNet20 and MNIST pixels")
    found = [Peer(name, args.threads) for name in MAKERS]
    missing = [peer.name for peer in found if not peer.installed]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    problems = [given for given in problems if args.only in given.name]
    rows = [row for given in problems for row in compare(given, found, args.gaps, args.repeats)]
    for peer in found:
        peer.stop()
    publish("Group-lasso paths, seconds to a certified gap", args, [*rows, *summary(rows)])


if __name__ == "__main__":
    main()
