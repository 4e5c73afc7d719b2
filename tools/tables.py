"""Write the tables of README.md and docs/ from bench/results/*.json, between markers; --check only compares.

A marker ``<!-- lowrank -->`` names a table and ``bench/results/lowrank.json``; ``<!-- lowrank.avx512 -->`` is
the same table of ``lowrank.avx512.json``, the results of another processor.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def read(name: str) -> dict[str, Any]:
    """Return one benchmark's results."""
    results: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def resnet20(name: str) -> str:
    """Top-1 of every recipe at every budget."""
    results = read(name)
    budgets = list(dict.fromkeys(row["budget"] for row in results["rows"]))
    recipes = list(dict.fromkeys(row["recipe"] for row in results["rows"]))
    rows = []
    for recipe in recipes:
        mine = [row for row in results["rows"] if row["recipe"] == recipe]
        rows.append([recipe, *(f"{row['top1']:.2f} ({row['top1_batchnorm']:.2f})" for row in mine)])
    text = table(["recipe", *(f"params {budget}" for budget in budgets)], rows)
    criterion = [f"{row['error']:.4f}" for row in results["rows"] if row["recipe"] == "alds, released"]
    return (
        f"{text}\n\nDense: {results['dense']:.2f} %. The largest layer error, which `alds()` minimises: "
        f"{' / '.join(criterion)}."
    )


def resnet20_data_aware(name: str) -> str:
    """Top-1 of each way of using data at every budget."""
    results = read(name)
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


def singular_values(name: str) -> str:
    """All spectra of ResNet-50."""
    return peers(name, "ResNet-50, 54 weights, groups 1, 2, 4, 8, 16")


def truncated_svd(name: str) -> str:
    """Factors of ResNet-50."""
    return peers(name, "ResNet-50, 54 weights, factors of half rank")


def plan(name: str) -> str:
    """Time to plan ResNet20."""
    results = read(name)
    rows = [[row["recipe"], f"{row['seconds']:.3f}"] for row in results["rows"]]
    return f"{table(['ResNet20, plan at params 0.5', 'seconds'], rows)}\n\n{where(results)}"


def lowrank_conv2d_bfloat16(name: str) -> str:
    """The fused convolution in bfloat16, for a batch of 1 and of 64 on one thread."""
    results = read(name.replace("_bfloat16", ""))
    layers: dict[tuple[int, ...], list[str]] = {}
    for row in results["rows"]:
        if row["dtype"] == "bfloat16" and row["threads"] == 1:
            layer = tuple(row[key] for key in ("channels", "side", "groups", "rank"))
            layers.setdefault(layer, []).extend(
                f"{row[ratio]:.2f}" for ratio in ("two / ours", "dense / ours")
            )
    rows = [
        [f"{channels} x {side} x {side}", str(groups), str(rank), *cells]
        for (channels, side, groups, rank), cells in layers.items()
    ]
    columns = [
        f"{ratio}, batch {batch}" for batch in (1, 64) for ratio in ("two calls / ours", "dense / ours")
    ]
    text = table(["layer, bfloat16", "groups", "rank", *columns], rows)
    return f"{text}\n\n{where(results | {'threads': 1})}"


def lowrank_conv2d(name: str) -> str:
    """The fused convolution in float32, for a batch of 64."""
    results = read(name)
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
    columns = [f"{ratio}, {count} thread{'s' * (count > 1)}" for count in counts for ratio in ratios.values()]
    text = table(["layer", "groups", "rank", *columns], rows)
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


def lowrank(name: str) -> str:
    """Whole networks at half of their MACs; folded dense ones in the better memory format."""
    results = read(name)
    networks = [dict(row) for row in results["rows"] if "network" in row]
    for row in networks:
        folded = [row[kind] for kind in ("dense folded", "dense folded channels_last") if kind in row]
        row |= {"dense folded": min(folded)} if folded else {}
        if "compiled" in row:
            row["compiled / folded"] = row["compiled"] / row.get("tuned folded", row["tuned"])
    columns = {
        kind: title
        for kind, title in (NETWORK_COLUMNS | NETWORK_RATIOS).items()
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


def minilm(name: str) -> str:
    """Cosine and nearest neighbours of the sentence encoder."""
    results = read(name)
    shares = sorted({row["share"] for row in results["rows"]}, reverse=True)
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in results["rows"]):
        mine = {row["share"]: row for row in results["rows"] if row["recipe"] == recipe}
        cells = [
            f"{mine[s]['cosine']:.3f} ({100 * mine[s]['nearest']:.1f} %)" if s in mine else "" for s in shares
        ]
        rows.append([recipe, *cells])
    header = ["recipe", *(f"linear layers {share}" for share in shares)]
    calibration, evaluation = results["calibration"], results["evaluation"]
    return (
        f"{table(header, rows)}\n\nCalibrated on {calibration['texts']} texts "
        f"({calibration['tokens']:,} tokens), evaluated on {evaluation['texts']} others. "
        f"torch {results['torch']}"
    )


def lenet(name: str) -> str:
    """Errors of both networks: a row a way, a column a network and budget."""
    results = read(name)
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
    dense = ", ".join(f"{network} {error:.2f} %" for network, error in results["dense"].items())
    header = ["chaining", *(f"{network}, params {budget}" for network, budget in cases)]
    return f"{table(header, rows)}\n\nDense: {dense}. torch {results['versions']['torch']}"


def group_lasso(name: str) -> str:
    """Speed-ups over the best peer along a path; what a peer was not given time for is a bound."""
    results = read(name)
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


def autocorrelation(name: str) -> str:
    """Speed-ups over stored patches, and memory."""
    results = read(name)
    rows = [
        [row["layer"], f"{row['speedup']:.1f}", f"{memory:.1f}" if (memory := row["memory / input"]) else ""]
        for row in results["rows"]
        if row["method"] == "lrcompress"
    ]
    header = ["images, channels, size, kernel, stride", "unfold and mm / ours", "memory / input"]
    return f"{table(header, rows)}\n\n{where(results)}"


def resnet20_lnr(name: str) -> str:
    """Top-1 of removed channels, of low rank, and of both."""
    results = read(name)
    budgets = sorted({row["budget"] for row in results["rows"]}, reverse=True)
    rows = []
    for recipe in dict.fromkeys(row["recipe"] for row in results["rows"]):
        cells = {row["budget"]: f"{row['top1']:.2f}" for row in results["rows"] if row["recipe"] == recipe}
        rows.append([recipe, *(cells.get(budget, "") for budget in budgets)])
    header = ["ResNet20, channels removed", *(f"params {budget}" for budget in budgets)]
    return f"{table(header, rows)}\n\nDense: {results['dense']:.2f} %. torch {results['torch']}"


def summary(_: str) -> str:
    """What each method keeps of ResNet20, by parameters kept: one column a method."""
    aware = {
        row["budget"]: row for row in read("resnet20_data_aware")["rows"] if row["way"] == "activation_aware"
    }
    plain = {(row["recipe"], row["budget"]): row for row in read("resnet20")["rows"]}
    lnr = {
        row["budget"]: row for row in read("resnet20_lnr")["rows"] if row["recipe"] == "bottom-up+top-down"
    }
    header = ["parameters kept", "`activation_aware()`", "`alds()`, no data", "`alds()`, batch norm renewed"]
    header += ["`lnr()`", "`lrank()`, batch norm renewed", "`svd()`, batch norm renewed"]
    rows = []
    for budget in (0.7, 0.5, 0.35, 0.25):
        alds = plain["alds, released", budget]
        cells = [aware[f"params {budget}"]["top1"], alds["top1"], alds["top1_batchnorm"], lnr[budget]["top1"]]
        cells += [plain[recipe, budget]["top1_batchnorm"] for recipe in ("lrank", "svd")]
        rows.append([f"{100 * budget:.0f} %", *(f"{cell:.1f}" for cell in cells)])
    return f"{table(header, rows)}\n\nDense: {read('resnet20')['dense']:.1f} %."


def speeds(name: str) -> str:
    """Whole networks at half of their MACs on one thread: the best dense time over ours, both folded."""
    results = read(name.replace("speeds", "lowrank"))
    rows = []
    for row in results["rows"]:
        if row.get("threads") != 1 or "network" not in row:
            continue
        network, inputs = row["network"][:-1].split(", [")
        ours = row.get("tuned folded", row["tuned"])
        folded = [row[kind] for kind in ("dense folded", "dense folded channels_last") if kind in row]
        dense = min(folded or [row[kind] for kind in ("dense", "dense channels_last") if kind in row])
        compiled = f"{row['compiled'] / ours:.2f}" if "compiled" in row else ""
        cells = [f"{dense:.1f}", f"{ours:.1f}", f"{dense / ours:.2f}", compiled]
        rows.append([f"{network}, {inputs.replace(', ', ' x ')}", *cells])
    header = [
        "network, inputs",
        "dense, ms",
        "ours, ms",
        "dense / ours",
        "`torch.compile` of the factors / ours",
    ]
    return f"{table(header, rows)}\n\n{where(results)}"


# Columns of networks, and the properties that each stands for.
CAPABILITIES = {
    "layers": ("layers",),
    "full rank": ("full rank", "full rank, statistics", "full rank, batches", "full rank, decoders"),
    "statistics": ("activation_aware, statistics",),
    "batches": ("activation_aware, batches",),
    "saved": ("save and load",),
    "folded": ("fold",),
    "unfused": ("unfuse",),
    "exported": ("export",),
    "lnr": ("lnr",),
}


def architectures(name: str) -> str:
    """What each small network is capable of."""
    results = read(name)
    rows = []
    for network, found in (item for item in results["networks"].items() if item[1]):
        cells = (
            "; ".join(dict.fromkeys(found.get(one, "not run") for one in each))
            for each in CAPABILITIES.values()
        )
        rows.append([network, *cells])
    versions = ", ".join(f"{library} {version}" for library, version in results["versions"].items())
    return f"{table(['network', *CAPABILITIES], rows)}\n\n{versions}"


def efficientnet_lite(name: str) -> str:
    """Agreement with the original network, by method and budget."""
    results = read(name)
    budgets = sorted({row["budget"] for row in results["rows"]}, reverse=True)
    rows = []
    for way in dict.fromkeys(row["way"] for row in results["rows"]):
        mine = {row["budget"]: row for row in results["rows"] if row["way"] == way}
        cells = [
            f"{100 * mine[b]['agreement']:.1f} % ({mine[b]['cosine']:.3f})" if b in mine else ""
            for b in budgets
        ]
        rows.append([way, *cells])
    return (
        f"{table(['method', *(f'macs {budget}' for budget in budgets)], rows)}\n\n"
        f"Calibrated on {results['calibration']} images, evaluated on {results['evaluation']} others. "
        f"torch {results['torch']}"
    )


TABLES = {
    "architectures": architectures,
    "efficientnet_lite": efficientnet_lite,
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
    "lowrank_conv2d_bfloat16": lowrank_conv2d_bfloat16,
    "lowrank": lowrank,
    "summary": summary,
    "speeds": speeds,
}


def filled(text: str) -> str:
    """Return a document with each table made anew.

    Raises:
        ValueError: a marker of no known table, or one without its end.
    """
    for name in re.findall(r"<!-- ([\w.]+) -->", text):
        kind = name.split(".")[0]
        parts = re.split(rf"(<!-- /?{re.escape(name)} -->)", text)
        if kind not in TABLES or len(parts) != 5:
            raise ValueError(f"{name}: no such table, or its markers do not stand there once each")
        text = "".join([*parts[:2], f"\n{TABLES[kind](name)}\n", *parts[3:]])
    return text


def main() -> int:
    """Rewrite or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a document would change"
    )
    check = parser.parse_args().check
    for document in DOCUMENTS:
        before = document.read_text()
        after = filled(before)
        if check and after != before:
            sys.exit(f"{document.name} differs from bench/results: run tools/tables.py")
        if not check:
            document.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
