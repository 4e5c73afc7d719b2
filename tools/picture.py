"""Draw docs/accuracy.svg, accuracy against size on ResNet20, from bench/results; --check only compares."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "accuracy.svg"

# Okabe and Ito (2008): colours that colour-blind readers can tell apart.
BLUE, GREEN, ORANGE, SKY, VERMILION, GREY = "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#d55e00", "#6b7480"
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 500, 40, 350
LOWEST, HIGHEST = 10.0, 90.0  # top-1 %; 10 is chance
SMALLEST, LARGEST = 20.0, 100.0  # parameters kept, %


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]  # parameters kept and top-1, both in %, by size
    dashed: bool = False  # not ours


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of one benchmark's results."""
    found: list[dict[str, Any]] = json.loads((ROOT / "bench/results" / f"{name}.json").read_text())["rows"]
    return found


def series(
    name: str, colour: str, chosen: list[dict[str, Any]], size: str, top1: str, dashed: bool = False
) -> Series:
    """Make a curve of some rows."""
    points = sorted((100 * row[size], row[top1]) for row in chosen)
    return Series(name, colour, tuple(points), dashed)


def curves() -> list[Series]:
    """Return all curves, the most accurate first."""
    aware = [
        row
        for row in rows("resnet20_data_aware")
        if row["way"] == "activation_aware" and row["budget"].startswith("params")
    ]
    plain = rows("resnet20")
    named = {
        name: [row for row in plain if row["recipe"] == name] for name in ("alds, released", "lrank", "svd")
    }
    lnr = [row for row in rows("resnet20_lnr") if row["recipe"] == "bottom-up+top-down"]
    pruned = [row for row in rows("pruning_peers") if row["way"] == "over all layers"]
    after = "top1_batchnorm"
    return [
        series("activation_aware", BLUE, aware, "params", "top1"),
        series("alds, no data but batch norm", SKY, named["alds, released"], "params", after),
        series("lnr, channels removed", GREEN, lnr, "kept", "top1"),
        series("L-Rank's ranks, batch norm", ORANGE, named["lrank"], "params", after, True),
        series("plain SVD, batch norm", VERMILION, named["svd"], "params", after, True),
        series("Torch-Pruning, batch norm", GREY, pruned, "params", "top1", True),
    ]


def at(size: float, top1: float) -> tuple[float, float]:
    """Return where a point lies."""
    x = LEFT + (RIGHT - LEFT) * (size - SMALLEST) / (LARGEST - SMALLEST)
    return x, BOTTOM - (BOTTOM - TOP) * (top1 - LOWEST) / (HIGHEST - LOWEST)


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Return a line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'


def drawn(dense: float) -> str:
    """Return the picture."""
    parts = [text(LEFT, 20, "ResNet20 on CIFAR-10, no labels, no fine-tuning: top-1 %", "start")]
    for top1 in range(10, 91, 10):
        _, y = at(0, top1)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#d8dee4"/>',
            text(LEFT - 8, y + 4, f"{top1}", "end"),
        ]
    for size in range(20, 101, 20):
        x, _ = at(size, 0)
        parts.append(text(x, BOTTOM + 18, f"{size}"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, "parameters kept, %"))
    _, y = at(0, dense)
    parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#1c2126" stroke-dasharray="2 3"/>')
    parts.append(text(RIGHT + 14, y + 4, f"dense, {dense:.1f}", "start"))
    for i, curve in enumerate(curves()):
        points = [at(*point) for point in curve.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{curve.colour}" stroke-width="2.2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{curve.colour}"/>' for x, y in points]
        y = 110 + 26 * i
        parts.append(f'<path d="M{RIGHT + 16} {y}h26" stroke="{curve.colour}" stroke-width="2.2"{dash}/>')
        parts.append(text(RIGHT + 50, y + 4, curve.name, "start"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = "text{font:13px system-ui,sans-serif;fill:#1c2126}"
    body = "\n".join(parts)
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>{ground}\n{body}\n</svg>\n'
    )


def main() -> None:
    """Write the picture, or say that it is not that of the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the picture would change"
    )
    args = parser.parse_args()
    dense = json.loads((ROOT / "bench/results/resnet20.json").read_text())["dense"]
    picture = drawn(dense)
    if args.check:
        if not PICTURE.exists() or PICTURE.read_text() != picture:
            sys.exit(f"{PICTURE.relative_to(ROOT)} is not that of the results: run tools/picture.py")
        return
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture)


if __name__ == "__main__":
    main()
