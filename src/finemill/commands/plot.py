"""Measured values as an SVG with a logarithmic height: no script, no font, no request."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 760, 420, 64
_COLOURS = ("#0b6e4f", "#a23b3b", "#3b5ba2")


def plot(series: Mapping[str, Sequence[tuple[float, float, str]]], *, x: str, y: str) -> str:
    """The picture of some lines.

    Args:
        series: by name, points of (x, y above 0, label).
        x: what the width is.
        y: what the height is.
    """
    points = [point for line in series.values() for point in line]
    left, right = min(point[0] for point in points), max(point[0] for point in points)
    low, high = (math.log10(find(point[1] for point in points)) for find in (min, max))

    def place(point: tuple[float, float, str]) -> tuple[float, float]:
        across = (point[0] - left) / ((right - left) or 1)
        up = (math.log10(point[1]) - low) / ((high - low) or 1)
        return _MARGIN + across * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="{_HEIGHT - 12}">{escape(x)} (from {left:.4g} to {right:.4g})</text>',
        f'<text x="{_MARGIN}" y="16">{escape(y)} (logarithmic, from {10**low:.2g} to {10**high:.2g})</text>',
    ]
    for row, ((name, line), colour) in enumerate(zip(series.items(), _COLOURS, strict=False)):
        parts.append(
            f'<text x="{_WIDTH - _MARGIN}" y="{16 + 14 * row}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
        placed = [(*place(point), point[2]) for point in sorted(line)]
        path = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y, _ in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for at_x, at_y, label in placed:
            parts.append(
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3" fill="{colour}"><title>{escape(name)}</title></circle>'
            )
            # Near the right edge a label would leave the picture.
            anchor = ' text-anchor="end"' if at_x > 0.8 * _WIDTH else ""
            parts.append(f'<text x="{at_x + 5:.1f}" y="{at_y - 5:.1f}"{anchor} fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def stack(pictures: Sequence[str]) -> str:
    """Several of them in one, each below the one before it."""
    placed = (
        picture.replace("<svg ", f'<svg y="{number * _HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" ', 1)
        for number, picture in enumerate(pictures)
    )
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT * len(pictures)}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', *placed, "</svg>", ""])
