"""Line charts as inline SVG: they need no script, print well, and stay small however long the run."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 64, 10, 10, 20
COLOURS = 8
"""Classes c0 to c7 of the page's style; a ninth curve has the first one's colour."""
TICKS = 5
MOST_POINTS = 600
"""Points that a chart draws, all curves together."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A name and its points."""

    name: str
    points: Points


def line_chart(curves: Sequence[Curve]) -> str:
    """One chart over a common x axis; each point tells its values when pointed at.

    Colours follow the order of `curves`, those without points included, so that a name keeps its colour on a page.
    """
    most = max(20, MOST_POINTS // max(1, len(curves)))
    drawn = [(number % COLOURS, curve.name, thinned(curve.points, most))
             for number, curve in enumerate(curves) if curve.points]
    xs = [x for _, _, points in drawn for x, _ in points]
    ys = [y for _, _, points in drawn for _, y in points]
    x_low, x_high, (y_low, y_high) = min(xs), max(xs), _span(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 1.0  # a single step, over its label
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
             f'aria-label="{html.escape(", ".join(name for _, name, _ in drawn))}">']
    ticks = _ticks(y_low, y_high)
    for value, label in zip(ticks, _labels(ticks), strict=True):
        y = place(x_low, value)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    if x_high > x_low:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 5}">{x_low:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step {x_high:g}</text>')
    for colour, name, points in drawn:
        placed = [(*place(x, y), x, y) for x, y in points]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in placed)
        size = 2.4 if len(placed) <= 60 else 1.2
        parts.append(f'<g class="c{colour}"><polyline points="{line}"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size}"><title>{html.escape(name)}, step {x:g}: {y:.5g}'
                  "</title></circle>" for px, py, x, y in placed]
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        stretched = range(start, min(start + stretch, len(points)))
        kept |= {min(stretched, key=lambda i: points[i][1]), max(stretched, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _span(low: float, high: float) -> tuple[float, float]:
    """What the y axis covers: a little more than the values."""
    room = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round values within the span, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _labels(values: Sequence[float]) -> list[str]:
    """Each with as few digits as tell them apart: seven characters, or a digit or two more for a narrow span."""
    for more in range(4):
        labels = [_label(value, more) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _label(value: float, more: int) -> str:
    """`more`: digits besides the usual ones."""
    if abs(value) >= 100_000 or 0 < abs(value) < 0.001:
        return f"{value:.{1 + more}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.{more}f}" if abs(value) >= 1000 else f"{value:.{3 + more}g}"
