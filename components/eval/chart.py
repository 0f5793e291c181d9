"""The training curve as an inline SVG: no script, no font, no request."""

import math
from dataclasses import dataclass

from finemill.artifacts.adapter import TrainingRecord

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 34


@dataclass(frozen=True)
class Tick:
    """A grid line: its place in pixels and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line in pixels, and its last value."""

    name: str
    points: str
    last_x: float
    last_y: float
    last_value: float


@dataclass(frozen=True)
class Chart:
    """What the page's template draws."""

    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def training_chart(training: TrainingRecord) -> Chart | None:
    """Training and validation loss by step, or None where fewer than two training losses were logged."""
    series = {"training loss": training.training_losses, "validation loss": training.validation_losses}
    if len(series["training loss"]) < 2:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks, y_ticks = nice_ticks(0.0, max(xs), 6), nice_ticks(min(0.0, *ys), max(ys), 5)
    x_range, y_range = (0.0, max(xs)), (y_ticks[0], y_ticks[-1])

    def x_at(value: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * (value - x_range[0]) / (x_range[1] - x_range[0]), 1)

    def y_at(value: float) -> float:
        share = (value - y_range[0]) / (y_range[1] - y_range[0])
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share, 1)

    curves = [
        Curve(
            name,
            " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points),
            x_at(points[-1][0]),
            y_at(points[-1][1]),
            points[-1][1],
        )
        for name, points in series.items()
        if points
    ]
    return Chart(
        curves,
        [Tick(x_at(value), f"{value:g}") for value in x_ticks if value <= x_range[1]],
        [Tick(y_at(value), f"{value:g}") for value in y_ticks],
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` or just below to `high` or just above, one step of 1, 2 or 5 apart."""
    span = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(span))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]
