"""Time to plan ResNet20: every spectrum of every group count, and the exact min-max.

python bench/plan.py [--threads 2] [--repeats 9] [--json bench/results/plan.json]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import arguments, median_and_spread, publish, timed_in_turn

import lrcompress as lrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from resnet20_cifar10 import ResNet20


def main() -> None:
    """Time the data-free plan for three error kinds, with and without counting MACs."""
    args = arguments(__doc__, repeats=9)
    model, x, budget = ResNet20().eval(), torch.randn(1, 3, 32, 32), lrc.Budget(params=0.5)
    methods = {
        "alds": lambda: lrc.plan(model, budget, lrc.alds()),
        "alds, counting MACs": lambda: lrc.plan(model, budget, lrc.alds(), example_inputs=x),
        "alds, four fold schemes": lambda: lrc.plan(model, budget, lrc.alds(schemes=(0, 1, 2, 3))),
        "alds, exact error": lambda: lrc.plan(model, budget, lrc.alds("exact")),
        "svd_energy": lambda: lrc.plan(model, budget, lrc.svd_energy()),
    }
    _, times = timed_in_turn(methods, args.repeats)
    rows = [
        {"recipe": name, "seconds": median_and_spread(seconds)[0], "spread": median_and_spread(seconds)[1]}
        for name, seconds in times.items()
    ]
    publish("Planning ResNet20 at half its parameters", args, rows)


if __name__ == "__main__":
    main()
