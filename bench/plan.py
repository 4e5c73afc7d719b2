"""Time to plan ResNet20: every spectrum of every group count, and the exact min-max.

python bench/plan.py [--threads 2] [--repeats 9] [--json bench/results/plan.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import environment, median_and_spread, print_table, timed_in_turn, write_results

import lrcompress as lrc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from resnet20_cifar10 import ResNet20


def main() -> None:
    """Time the data-free plan for three error kinds, with and without counting MACs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
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
    print_table(f"Planning ResNet20 at half its parameters, {args.threads} threads", rows)
    write_results(
        args.json, {"threads": args.threads, "repeats": args.repeats, "rows": rows, **environment()}
    )


if __name__ == "__main__":
    main()
