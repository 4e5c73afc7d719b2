"""Write the tables of README.md from bench/results/*.json, between their markers; --check only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def read(name: str) -> dict[str, Any]:
    """Return one benchmark's results."""
    results: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resnet20() -> str:
    """Top-1 of every recipe at every budget."""
    results = read("resnet20")
    budgets = list(dict.fromkeys(row["budget"] for row in results["rows"]))
    names = list(dict.fromkeys(row["recipe"] for row in results["rows"]))
    rows = []
    for name in names:
        mine = [row for row in results["rows"] if row["recipe"] == name]
        rows.append([name, *(f"{row['top1']:.2f} ({row['top1_batchnorm']:.2f})" for row in mine)])
    text = table(["recipe", *(f"params {budget}" for budget in budgets)], rows)
    criterion = [f"{row['error']:.4f}" for row in results["rows"] if row["recipe"] == "alds, released"]
    return (
        f"{text}\n\nDense: {results['dense']:.2f} %. The largest layer error, which `alds()` minimises: "
        f"{' / '.join(criterion)}."
    )


def resnet20_data_aware() -> str:
    """Top-1 of each way of using data at every budget."""
    results = read("resnet20_data_aware")
    budgets = list(dict.fromkeys(row["budget"] for row in results["rows"]))
    rows = []
    for way in dict.fromkeys(row["way"] for row in results["rows"]):
        mine = [row for row in results["rows"] if row["way"] == way]
        rows.append([way, *(f"{row['top1']:.2f}" for row in mine)])
    return f"{table(['factors', *budgets], rows)}\n\nDense: {results['dense']:.2f} %."


def where(results: dict[str, Any]) -> str:
    """Say on what a figure was taken; rows may have their own number of threads."""
    threads = "" if "threads" in results["rows"][0] else f"{results['threads']} threads, "
    return f"{results['cpu']}, {results['isa']}, {threads}torch {results['torch']}, {results['date']}"


def peers(name: str, title: str) -> str:
    """Ours beside the library's calls."""
    results = read(name)
    rows = [
        [row["method"], f"{row['seconds']:.2f}", f"{row['speedup']:.1f}", f"{row['error']:.1e}"]
        for row in results["rows"]
    ]
    header = [title, "seconds", "speed-up", "relative error"]
    return f"{table(header, rows)}\n\n{where(results)}"


def singular_values() -> str:
    """All spectra of ResNet-50."""
    return peers("singular_values", "ResNet-50, 54 weights, groups 1, 2, 4, 8, 16")


def truncated_svd() -> str:
    """Factors of ResNet-50."""
    return peers("truncated_svd", "ResNet-50, 54 weights, factors of half rank")


def plan() -> str:
    """Time to plan ResNet20."""
    results = read("plan")
    rows = [[row["recipe"], f"{row['seconds']:.3f}"] for row in results["rows"]]
    return f"{table(['ResNet20, plan at params 0.5', 'seconds'], rows)}\n\n{where(results)}"


def lowrank_conv2d() -> str:
    """The fused convolution in float32, for a batch of 64."""
    results = read("lowrank_conv2d")
    counts = list(dict.fromkeys(row["threads"] for row in results["rows"]))
    ratios = {"two / ours": "two calls / ours", "dense / ours": "dense / ours"}
    layers: dict[tuple[int, ...], list[str]] = {}
    for row in results["rows"]:
        if row["dtype"] == "float32" and row["batch"] == 64:
            layer = tuple(row[key] for key in ("channels", "side", "groups", "rank"))
            layers.setdefault(layer, []).extend(f"{row[ratio]:.1f}" for ratio in ratios)
    rows = [
        [f"{channels} x {side} x {side}", str(groups), str(rank), *cells]
        for (channels, side, groups, rank), cells in layers.items()
    ]
    names = [f"{name}, {count} thread{'s' * (count > 1)}" for count in counts for name in ratios.values()]
    text = table(["layer", "groups", "rank", *names], rows)
    return f"{text}\n\n{where(results | {'threads': ' and '.join(map(str, counts))})}"


NETWORK_COLUMNS = {
    "dense": "dense",
    "dense channels_last": "dense, channels_last",
    "two": "two calls",
    "two channels_last": "two calls, channels_last",
    "compiled": "two calls, compiled",
    "ours": "ours",
    "tuned": "tuned",
    "dense folded": "dense, folded",
    "tuned folded": "tuned, folded",
}
NETWORK_RATIOS = {
    "dense / tuned": "dense / tuned",
    "dense / tuned, both folded": "both folded",
    "compiled / folded": "compiled / tuned, folded",
}


def lowrank() -> str:
    """Whole networks at half of their MACs; folded dense ones in the better memory format."""
    results = read("lowrank")
    networks = [dict(row) for row in results["rows"] if "network" in row]
    for row in networks:
        folded = [row[kind] for kind in ("dense folded", "dense folded channels_last") if kind in row]
        row |= {"dense folded": min(folded)} if folded else {}
        if "compiled" in row:
            row["compiled / folded"] = row["compiled"] / row.get("tuned folded", row["tuned"])
    columns = {
        kind: name
        for kind, name in (NETWORK_COLUMNS | NETWORK_RATIOS).items()
        if any(kind in row for row in networks)
    }
    rows = [
        [
            "{}, {}".format(*(part.replace(", ", " x ") for part in row["network"][:-1].split(", ["))),
            str(row["threads"]),
            *(f"{row[kind]:.2f}" if kind in row else "" for kind in columns),
        ]
        for row in networks
    ]
    return f"{table(['ms for inputs', 'threads', *columns.values()], rows)}\n\n{where(results)}"


def minilm() -> str:
    """Cosine and nearest neighbours of the sentence encoder."""
    results = read("minilm")
    shares = sorted({row["share"] for row in results["rows"]}, reverse=True)
    rows = []
    for name in dict.fromkeys(row["recipe"] for row in results["rows"]):
        mine = {row["share"]: row for row in results["rows"] if row["recipe"] == name}
        cells = [
            f"{mine[s]['cosine']:.3f} ({100 * mine[s]['nearest']:.1f} %)" if s in mine else "" for s in shares
        ]
        rows.append([name, *cells])
    header = ["recipe", *(f"linear layers {share}" for share in shares)]
    calibration, evaluation = results["calibration"], results["evaluation"]
    return (
        f"{table(header, rows)}\n\nCalibrated on {calibration['texts']} texts "
        f"({calibration['tokens']:,} tokens), evaluated on {evaluation['texts']} others. "
        f"torch {results['torch']}"
    )


def lenet() -> str:
    """Errors of both networks: a row a way, a column a network and budget."""
    results = read("lenet")
    cases = list(dict.fromkeys((row["network"], row["budget"]) for row in results["rows"]))
    shrunk = {row["way"] for row in results["rows"] if not row["debias"]}  # low rank has no such variant
    rows = []
    for way, debias in dict.fromkeys((row["way"], row["debias"]) for row in results["rows"]):
        cells = []
        for case in cases:
            same = (way, debias, *case)
            for row in results["rows"]:
                if (row["way"], row["debias"], row["network"], row["budget"]) == same:
                    more = f" ({row['error_retrained']:.2f})" if debias else ""
                    cells.append(f"{row['error']:.2f}{more}")
        kind = f", {'debiased' if debias else 'shrunk'}" if way in shrunk else ""
        rows.append([way + kind, *cells])
    dense = ", ".join(f"{name} {error:.2f} %" for name, error in results["dense"].items())
    header = ["chaining", *(f"{name}, params {budget}" for name, budget in cases)]
    return f"{table(header, rows)}\n\nDense: {dense}. torch {results['versions']['torch']}"


def group_lasso() -> str:
    """Speed-ups over the best peer along a path; what a peer was not given time for is a bound."""
    results = read("group_lasso")
    columns = {
        "speed-up over the best peer": "problem, outputs x inputs",
        "sparse half, 1e-06": "sparse half",
        "path, 1e-06": "whole path",
        "worst point": "slowest point",
        "worst with rows": "slowest point, peers' preparation counted",
    }
    rows = [
        [f"{row[key]:.3g}" if isinstance(row[key], float) else row[key] for key in columns]
        for row in results["rows"]
        if "worst point" in row
    ]
    return f"{table(list(columns.values()), rows)}\n\n{where(results)}"


def autocorrelation() -> str:
    """Speed-ups over stored patches, and memory."""
    results = read("autocorrelation")
    rows = [
        [row["layer"], f"{row['speedup']:.1f}", f"{memory:.1f}" if (memory := row["memory / input"]) else ""]
        for row in results["rows"]
        if row["method"] == "lrcompress"
    ]
    header = ["images, channels, size, kernel, stride", "unfold and mm / ours", "memory / input"]
    return f"{table(header, rows)}\n\n{where(results)}"


def resnet20_lnr() -> str:
    """Top-1 of removed channels, of low rank, and of both."""
    results = read("resnet20_lnr")
    budgets = sorted({row["budget"] for row in results["rows"]}, reverse=True)
    rows = []
    for name in dict.fromkeys(row["recipe"] for row in results["rows"]):
        cells = {row["budget"]: f"{row['top1']:.2f}" for row in results["rows"] if row["recipe"] == name}
        rows.append([name, *(cells.get(budget, "") for budget in budgets)])
    header = ["ResNet20, channels removed", *(f"params {budget}" for budget in budgets)]
    return f"{table(header, rows)}\n\nDense: {results['dense']:.2f} %. torch {results['torch']}"


TABLES = {
    "resnet20_lnr": resnet20_lnr,
    "group_lasso": group_lasso,
    "autocorrelation": autocorrelation,
    "lenet": lenet,
    "resnet20_data_aware": resnet20_data_aware,
    "resnet20": resnet20,
    "minilm": minilm,
    "singular_values": singular_values,
    "truncated_svd": truncated_svd,
    "plan": plan,
    "lowrank_conv2d": lowrank_conv2d,
    "lowrank": lowrank,
}


def main() -> int:
    """Rewrite or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where README.md differs from the results")
    check = parser.parse_args().check
    before = text = README.read_text()
    for name, make in TABLES.items():
        parts = re.split(rf"(<!-- /?{name} -->)", text)
        if len(parts) != 5:
            sys.exit(f"README.md must hold both markers of {name} once")
        text = "".join([*parts[:2], f"\n{make()}\n", *parts[3:]])
    if check and text != before:
        sys.exit("README.md differs from bench/results: run tools/readme_tables.py")
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
