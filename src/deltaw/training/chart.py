"""A small line chart as inline SVG, coloured by the page's CSS variables, so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 74, 72, 16, 46

Line = tuple[str, Sequence[tuple[float, float]]]
"""Name, points (x, y). One point stands for a level that does not change."""


def chart(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """The `<svg>` of `lines`; colours are var(--c0), var(--c1) ... in their order."""
    curves = [(i, name, points) for i, (name, points) in enumerate(lines) if points]
    xs = [x for _, _, points in curves for x, _ in points if len(points) > 1] or [0.0, 1.0]
    ys = [y for _, _, points in curves for _, y in points] or [0.0, 1.0]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    x0, x1 = min(0.0, *xs), max(*xs, x_ticks[-1])
    y0, y1 = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1.0)
        up = (y - y0) / ((y1 - y0) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for y in y_ticks:
        _, v = at(x0, y)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        h, _ = at(x, y0)
        out.append(f'<text class="tick" x="{h:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(x)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    out.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<text class="label" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    ends = []
    for i, name, points in curves:
        colour = f"var(--c{i % 8})"
        if len(points) == 1:
            points = [(x0, points[0][1]), (x1, points[0][1])]
            dash = ' stroke-dasharray="5 4"'
        else:
            dash = ""
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{h:.1f},{v:.1f}" for h, v in places)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{path}"/>')
        if not dash:
            for (h, v), (x, y) in zip(places, points):
                out.append(
                    f'<circle cx="{h:.1f}" cy="{v:.1f}" r="3.5" fill="{colour}"><title>{escape(name)}: {y:.4f} at {number(x)}</title></circle>'
                )
        ends.append((places[-1][1], places[-1][0], name, colour))
    out += _names(sorted(ends))
    return "\n".join([*out, "</svg>"])


def _names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """The lines' names at their right ends, pushed apart where they would overlap."""
    last, places = -math.inf, []
    for v, _, _, _ in ends:
        last = max(v, last + 15)
        places.append(last)
    over = max(0.0, last - (HEIGHT - BOTTOM))
    return [
        f'<text class="name" x="{h + 9:.1f}" y="{v - over + 4:.1f}" fill="{colour}">{escape(name)}</text>'
        for v, (_, h, name, colour) in zip(places, ends)
    ]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values that enclose [low, high], about so many."""
    span = high - low or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A tick without needless zeros."""
    return f"{value:.6g}"
