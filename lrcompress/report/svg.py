"""Two plots as SVG text, to stand inside an HTML page whose style sheet sets their colours.

Classes: ``grid`` and ``axis`` (lines), ``before`` and ``after`` (bars), ``curve``, ``chosen`` (line and dot).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHARACTER = 6.6  # px, the width of an average letter at the 11 px font of the page
LONGEST_LABEL = 44  # letters; what is cut is still there as a tool tip
BAR_STEP = 20  # px from one row of bars to the next
ROUNDING = 1e-9  # relative slack, so that 1 / 0.2 counts as 5 steps


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    label: str
    before: float
    after: float
    note: str  # at the end of the bar


@dataclass(frozen=True)
class Axis:
    """One axis from 0 to ``end``."""

    label: str
    end: float

    def ticks(self, most: int) -> list[float]:
        """Return 0 and at most ``most`` steps up to ``end``, spaced by 1, 2 or 5 times a power of ten."""
        rough = self.end / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - ROUNDING))
        return [step * i for i in range(math.floor(self.end / step + ROUNDING) + 1)]


def bar_chart(bars: Sequence[Bar], unit: str, width: int = 900) -> str:
    """Draw a row a bar, ``after`` upon ``before``; the height grows with the rows, so all stay legible."""
    left = 12 + CHARACTER * min(LONGEST_LABEL, max(len(bar.label) for bar in bars))
    right = 16 + CHARACTER * max(len(bar.note) for bar in bars)
    axis = Axis(unit, max(1.0, *(max(bar.before, bar.after) for bar in bars)))
    scale, bottom = (width - left - right) / axis.end, 24 + BAR_STEP * len(bars)
    parts = []
    for tick in axis.ticks(5):
        x = left + tick * scale
        parts += [_line("grid", x, 20, x, bottom), _text(x, 14, f"{tick:,g}", "middle")]
    for row, bar in enumerate(bars):
        top = 24 + BAR_STEP * row
        label = bar.label if len(bar.label) <= LONGEST_LABEL else f"{bar.label[: LONGEST_LABEL - 1]}…"
        parts += [
            _text(left - 6, top + 12, label, "end", tip=bar.label),
            _rectangle("before", left, top + 2, bar.before * scale, 14),
            _rectangle("after", left, top + 5, bar.after * scale, 8),
            _text(left + max(bar.before, bar.after) * scale + 6, top + 12, bar.note, "start"),
        ]
    parts.append(_line("axis", left, 20, left, bottom))
    return _svg(width, bottom + 6, f"{unit} before and after", parts)


def line_chart(
    title: str,
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float],  # the second may be nan: then only the line across is drawn
    x_axis: Axis,
    y_axis: Axis,
    width: int = 226,
    height: int = 170,
) -> str:
    """Draw one curve and the chosen point on axes from 0; points beyond an axis are left out."""
    left, right, top, bottom = 46, width - 12, 26, height - 34

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_axis.end, bottom - (bottom - top) * y / y_axis.end

    longest = int((width - 8) / CHARACTER)
    heading = title if len(title) <= longest else f"…{title[1 - longest :]}"  # a name's end tells the most
    parts = [_text(4, 14, heading, "start", tip=title)]
    for tick in x_axis.ticks(5):
        x, _ = at(tick, 0)
        parts += [_line("grid", x, top, x, bottom), _text(x, bottom + 14, f"{tick:.3g}", "middle")]
    for tick in y_axis.ticks(5):
        _, y = at(0, tick)
        parts += [_line("grid", left, y, right, y), _text(left - 4, y + 4, f"{tick:.3g}", "end")]
    parts += [
        _line("axis", left, top, left, bottom),
        _line("axis", left, bottom, right, bottom),
        _text((left + right) / 2, height - 4, x_axis.label, "middle"),
        _text(-(top + bottom) / 2, 10, y_axis.label, "middle", turn=-90),
    ]
    inside = [at(x, y) for x, y in points if x <= x_axis.end and y <= y_axis.end]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in inside)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    x, _ = at(chosen[0], 0)
    parts.append(_line("chosen", x, top, x, bottom))
    if not math.isnan(chosen[1]):
        x, y = at(*chosen)
        parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return _svg(width, height, title or y_axis.label, parts)


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join(parts)
    return f'<svg {size} role="img" aria-label="{escape(title)}">\n{body}\n</svg>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, tip: str = "", turn: int = 0) -> str:
    inner = f"<title>{escape(tip)}</title>{escape(text)}" if tip else escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" transform="rotate({turn})">{inner}</text>'
