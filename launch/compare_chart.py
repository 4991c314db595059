"""Learning curves as one SVG, written by hand: a line a method, thin lines for its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

XY = tuple[float, float]
COLORS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"),
    *("#e377c2", "#17becf", "#bcbd22", "#7f7f7f", "#393b79", "#637939"),
)
WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 600, 20, 370
TICKS = 5


@dataclass(frozen=True)
class Curve:
    """(x, accuracy) points: the mean over seeds, and each seed's."""

    label: str
    mean: Sequence[XY]
    runs: Sequence[Sequence[XY]]


@dataclass(frozen=True)
class Scale:
    """From data to pixels."""

    x_max: float
    y_max: float

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Scale:
        points = [point for curve in curves for run in curve.runs for point in run]
        x_max = max((x for x, _ in points), default=0) or 1
        y_max = max((y for _, y in points), default=0)
        return cls(x_max, min(1.0, max(0.1, 1.1 * y_max)))

    def place(self, point: XY) -> str:
        x = LEFT + point[0] / self.x_max * (RIGHT - LEFT)
        y = BOTTOM - point[1] / self.y_max * (BOTTOM - TOP)
        return f"{x:.1f},{y:.1f}"


def draw_curves(curves: Sequence[Curve], x_label: str) -> str:
    scale = Scale.of(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *axes(scale, x_label),
    ]
    for i, curve in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        dash = ' stroke-dasharray="6 3"' if i >= len(COLORS) else ""
        parts += [line(run, scale, f'stroke="{color}" stroke-opacity="0.3"') for run in curve.runs]
        parts.append(line(curve.mean, scale, f'stroke="{color}" stroke-width="2.5"{dash}'))
        y = TOP + 12 + 20 * i
        parts.append(
            f'<line x1="{RIGHT + 20}" y1="{y}" x2="{RIGHT + 44}" y2="{y}" stroke="{color}" stroke-width="2.5"{dash}/>'
        )
        parts.append(f'<text x="{RIGHT + 50}" y="{y + 4}">{escape(curve.label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def line(points: Sequence[XY], scale: Scale, style: str) -> str:
    places = " ".join(scale.place(point) for point in points)
    return f'<polyline points="{places}" fill="none" {style}/>'


def axes(scale: Scale, x_label: str) -> list[str]:
    parts = []
    for i in range(TICKS + 1):
        x, y = scale.x_max * i / TICKS, scale.y_max * i / TICKS
        across, up = scale.place((x, 0)).split(",")[0], scale.place((0, y)).split(",")[1]
        parts.append(
            f'<line x1="{LEFT}" y1="{up}" x2="{RIGHT}" y2="{up}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 6}" y="{up}" dy="4" text-anchor="end">{100 * y:.0f} %</text>'
            f'<text x="{across}" y="{BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>'
        )
    middle = (LEFT + RIGHT) / 2
    return [
        *parts,
        f'<text x="{middle}" y="{BOTTOM + 38}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="{LEFT}" y="{TOP - 6}">accuracy</text>',
    ]
