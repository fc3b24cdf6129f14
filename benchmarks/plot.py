"""The plots, as SVG written by hand: bars of the systems side by side, and quantities that grow.

Rules: a plot draws its own background and follows the reader's light or dark preference, so that it is readable
anywhere; every mark carries its number; nothing but the standard library.
"""

import math
from dataclasses import dataclass
from html import escape

STYLE = """<style>
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --accent: #0b6bcb; --bar: #8c96a3;
  --second: #e08600; --third: #1a936f; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --accent: #4c9df3; --bar: #6b7684;
    --second: #f0a030; --third: #35b58d; }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.title { font-size: 17px; font-weight: 600; }
.head { font-weight: 600; }
.soft { fill: var(--soft); }
.strong { font-weight: 700; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
</style>"""
PARTS = [("gateway", "--accent"), ("message service", "--second"), ("PostgreSQL", "--third")]


@dataclass(frozen=True)
class Row:
    """One system in the bar plot."""

    title: str
    requests_per_second: float
    cpu: list[float]
    """µs per request: gateway, message service, PostgreSQL."""
    subject: bool
    alone: bool
    """Without message service and database."""
    fresh: bool


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, extra: str = "") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
        f'style="fill: var({colour})" {extra}/>'
    )


def document(width: int, height: int, title: str, marks: list[str]) -> str:
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n{STYLE}'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" style="fill: var(--paper); stroke: var(--line)"/>'
    return "\n".join([start, paper, text(24, 34, title, "title"), *marks, "</svg>"]) + "\n"


def bars(rows: list[Row], clients: int) -> str:
    """Requests per second and CPU per request of each system; those without a service behind them apart."""
    labels, speed, cost, pitch = 280, 300, 600, 30
    length = 215
    rows = sorted(rows, key=lambda row: (row.alone, -row.requests_per_second))
    fastest = max(row.requests_per_second for row in rows)
    dearest = max(sum(row.cpu) for row in rows)
    marks = [
        text(speed, 66, "requests per second", "head"),
        text(cost, 66, "CPU µs per request", "head"),
        text(24, 66, f"{clients} clients", "soft"),
    ]
    y = 84.0
    for index, row in enumerate(rows):
        if row.alone and index and not rows[index - 1].alone:
            marks.append(text(24, y + 24, "without message service and database:", "soft"))
            y += 34
        kind = "strong" if row.subject else ""
        middle = y + 14
        marks.append(text(labels, middle + 1, row.title + ("" if row.fresh else " (stale answers)"), f"{kind} end"))
        width = row.requests_per_second / fastest * length
        fade = 'opacity="0.45"' if row.alone else ""
        marks.append(box(speed, y, width, 19, "--accent" if row.subject else "--bar", fade))
        marks.append(text(speed + width + 6, middle + 1, f"{row.requests_per_second:,.0f}", kind))
        x = float(cost)
        for (_, colour), part in zip(PARTS, row.cpu, strict=True):
            if part >= 0.5:
                marks.append(box(x, y, part / dearest * length, 19, colour))
                x += part / dearest * length
        marks.append(text(x + 6, middle + 1, f"{sum(row.cpu):,.0f}", kind))
        y += pitch
    x = 560.0
    for name, colour in PARTS:
        marks.append(box(x, y + 8, 11, 11, colour))
        marks.append(text(x + 16, y + 18, name, "soft"))
        x += 32 + 7.2 * len(name)
    return document(900, int(y + 36), "A string from PostgreSQL, through two HTTP services", marks)


@dataclass(frozen=True)
class Line:
    """One quantity over the plot's horizontal axis."""

    name: str
    colour: str
    values: list[float]
    above: int
    """How far its numbers are above the line; below, if that is negative."""


def growth(title: str, axis: str, positions: list[int], lines: list[Line]) -> str:
    """Quantities that grow with another, both axes logarithmic."""
    left, right, top, bottom = 92, 690, 60, 330
    values = [value for line in lines for value in line.values]
    highest = 10 ** math.ceil(math.log10(max(values)))
    lowest = 10 ** math.floor(math.log10(max(0.1, 0.6 * min(values))))
    span = math.log(positions[-1] / positions[0]) or 1.0

    def x(position: int) -> float:
        return left + math.log(position / positions[0]) / span * (right - left)

    def y(value: float) -> float:
        return bottom - math.log(max(value, lowest) / lowest) / math.log(highest / lowest) * (bottom - top)

    marks = []
    tick = lowest
    while tick <= highest:
        marks.append(f'<path d="M{left} {y(tick):.1f}H{right}" style="stroke: var(--line)"/>')
        marks.append(text(left - 10, y(tick) + 4, f"{tick:,.10g}", "soft end"))
        tick *= 10
    marks += [text(x(position), bottom + 22, f"{position:,}", "soft middle") for position in positions]
    marks.append(text((left + right) / 2, bottom + 46, axis, "soft middle"))
    for line in lines:
        points = [(x(position), y(value), value) for position, value in zip(positions, line.values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        marks.append(f'<polyline points="{path}" style="fill: none; stroke: var({line.colour}); stroke-width: 3"/>')
        for across, down, value in points:
            marks.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" style="fill: var({line.colour})"/>')
            marks.append(text(across, down - line.above, f"{value:,.0f}", "middle"))
        marks.append(text(right + 16, points[-1][1] + 4, line.name, "head"))
    return document(900, 400, title, marks)
