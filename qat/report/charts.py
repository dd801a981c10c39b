"""Chart geometry for report.html: numbers to SVG coordinates in a 1000 x 1000 box that the page stretches to fit.

Only lines and rectangles are drawn in that box; text is HTML beside it, so it keeps its size on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qat.report.metrics import Curve, thin
from qat.report.schema import Layer

MOST_POINTS = 80


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A label and its place along the axis, in percent."""

    label: str
    at: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm: the path of its bucket means, and the same points (step, value) for the read-out."""

    arm: str
    path: str
    points: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Curves of one metric over steps. `mark`: where fake-quant starts, in percent of the width."""

    name: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    first: int
    last: int
    mark: float | None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One layer: left edge and width, and the height of its two columns, all in the box's units."""

    layer: Layer
    x: float
    width: float
    sqnr: float
    clip: float
    worst: bool


@dataclass(frozen=True, kw_only=True)
class LayerChart:
    """Columns over the layers in the model's order, and the layers with the lowest SQNR. `clipped`: whether any is."""

    bars: list[Bar]
    sqnr_ticks: list[Tick]
    clip_ticks: list[Tick]
    worst: list[Layer]
    clipped: bool


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _labels(values: Sequence[float]) -> list[str]:
    """As many decimals as tell neighbours apart."""
    gap = values[1] - values[0] if len(values) > 1 else max(abs(values[0]), 1) if values else 1
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def _ticks(low: float, high: float, count: int, *, upward: bool) -> list[Tick]:
    values = ticks(low, high, count)
    places = [100 * (value - low) / (high - low) for value in values]
    return [Tick(label=t, at=100 - p if upward else p) for t, p in zip(_labels(values), places, strict=True)]


def line_chart(name: str, curves: dict[str, Curve], quant_start: int | None = None) -> LineChart:
    """Curves of one metric, one line an arm; every curve has at least one point. Range: what the means cover."""
    thinned = {arm: thin(curve, MOST_POINTS) for arm, curve in curves.items()}
    steps = [step for curve in curves.values() for step, _ in curve]
    first, last = min(steps), max(steps)
    means = [mean for buckets in thinned.values() for _, mean in buckets]
    pad = (max(means) - min(means)) * 0.06 or max(abs(means[0]) * 0.05, 1e-3)
    low, high = min(means) - pad, max(means) + 2 * pad
    span = max(last - first, 1)

    def x(step: float) -> str:
        return f"{1000 * (step - first) / span:.1f}"

    def y(value: float) -> str:
        return f"{1000 * (high - value) / (high - low):.1f}"

    lines: list[Line] = []
    for arm, buckets in thinned.items():
        lines.append(
            Line(
                arm=arm,
                path="M" + "L".join(f"{x(step)} {y(mean)}" for step, mean in buckets),
                points=[(step, round(mean, 5)) for step, mean in buckets],
            )
        )
    inside = "qat" in curves and quant_start is not None and first < quant_start < last
    return LineChart(
        name=name,
        lines=lines,
        x_ticks=_ticks(first, first + span, 6, upward=False),
        y_ticks=_ticks(low, high, 5, upward=True),
        first=first,
        last=first + span,
        mark=100 * (quant_start - first) / span if inside and quant_start is not None else None,
    )


def layer_chart(layers: Sequence[Layer], most_worst: int = 5) -> LayerChart:
    """SQNR columns from 0 dB and clip-rate columns from 0, each to its own highest value. Among few layers none is
    marked as worst."""
    sqnr_top = max(max(layer["sqnr_db"] for layer in layers) * 1.05, 1.0)
    clip_top = max(max(layer["clip_rate"] for layer in layers) * 1.05, 1e-6)
    lowest = sorted(layers, key=lambda layer: layer["sqnr_db"])[:most_worst]
    pitch = 1000 / len(layers)
    bars = [
        Bar(
            layer=layer,
            x=round(index * pitch + 0.1 * pitch, 2),
            width=round(0.8 * pitch, 2),
            sqnr=round(1000 * max(layer["sqnr_db"], 0) / sqnr_top, 1),
            clip=round(1000 * layer["clip_rate"] / clip_top, 1),
            worst=layer in lowest and len(layers) > 2 * most_worst,
        )
        for index, layer in enumerate(layers)
    ]
    clip_ticks = _ticks(0, 100 * clip_top, 2, upward=True)
    return LayerChart(
        bars=bars,
        sqnr_ticks=_ticks(0, sqnr_top, 4, upward=True),
        clip_ticks=clip_ticks,
        worst=lowest,
        clipped=any(layer["clip_rate"] for layer in layers),
    )
