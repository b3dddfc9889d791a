"""Line charts as inline SVG: they need no script and print well."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 22


@dataclass(frozen=True, slots=True)
class Curve:
    """A name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(curves: Sequence[Curve]) -> str:
    """One chart for up to three curves over a common x axis; each point tells its values when pointed at."""
    drawn = [curve for curve in curves if curve.points]
    xs = [x for curve in drawn for x, _ in curve.points]
    ys = [y for curve in drawn for _, y in curve.points]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if y_high - y_low < 1e-12:
        y_low, y_high = y_low - abs(y_low) * 0.1 - 1e-9, y_high + abs(y_high) * 0.1 + 1e-9

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / max(x_high - x_low, 1e-12)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for share in (0.0, 0.5, 1.0):
        value = y_low + share * (y_high - y_low)
        y = place(x_low, value)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{_label(value)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{x_low:g}</text>'
                 f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {x_high:g}</text>')
    for number, curve in enumerate(drawn):
        placed = [(*place(x, y), x, y) for x, y in curve.points]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in placed)
        parts.append(f'<g class="c{number % 3}"><polyline points="{line}"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2"><title>{html.escape(curve.name)}, step {x:g}: {y:.5g}'
                  "</title></circle>" for px, py, x, y in placed]
        parts.append("</g>")
        if len(drawn) > 1:
            parts.append(f'<text class="c{number % 3}" style="stroke: none" x="{WIDTH - RIGHT}" '
                         f'y="{TOP + 12 * (number + 1)}" text-anchor="end">{html.escape(curve.name)}</text>')
    return "".join(parts) + "</svg>"


def _label(value: float) -> str:
    """At most seven characters."""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 100_000 else f"{value:.0e}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.0e}"
