"""This module holds where values lie on a drawing, and the lines and names beside them. It does not know the chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .numbers import number, quantity

__all__ = ["Axis", "Frame", "make_axis"]

LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 26.0, 44.0
"""Around the plot, for names of ticks and axes."""
TICK_PIXELS = 75
"""A tick for so many pixels of width."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The values from `low` to `high`, evenly or by their logarithms."""

    label: str
    low: float
    high: float
    is_log: bool = False
    names: Sequence[str] | None = None
    """What to call 0, 1, 2, ... instead."""

    def __call__(self, value: float) -> float:
        """Return where a value lies: 0 to 1."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return at most about so many values with their names."""
        if self.names is not None:
            step = -(-len(self.names) // most)
            return [(i, self.names[i]) for i in range(0, len(self.names), step)]
        values = _log_ticks(self.low, self.high, most) if self.is_log else _linear_ticks(self.low, self.high, most)
        is_large = max(map(abs, values), default=0.0) >= 1e5
        return [(value, _short(value, is_large)) for value in values]


def _short(value: float, is_large: bool) -> str:
    """Return what stands at a tick: 1k, not 1.00 k."""
    head, _, prefix = (quantity(value) if is_large else number(float(value))).partition(" ")
    head, power, exponent = head.partition("e")
    return (head.rstrip("0").rstrip(".") if "." in head else head) + power + exponent + prefix


def make_axis(label: str, values: Sequence[float], *, is_log: bool = False, names: Sequence[str] | None = None) -> Axis:
    """Return an axis on which all values lie: from 0 where that is near, or between powers of ten."""
    if names is not None:
        return Axis(label, -0.5, len(names) - 0.5, names=names)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if is_log:
        assert low > 0, "a logarithmic axis is for values above 0"
        low, high = 10 ** math.floor(math.log10(low) + 1e-9), 10 ** math.ceil(math.log10(high) - 1e-9)
        return Axis(label, low, high if high > low else 10 * low, is_log=True)
    if 0 <= low <= 0.5 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    return Axis(label, low, high + 0.04 * (high - low))


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    step = max(1, -(-(last - first) // most))
    factors = (1, 2, 5) if 3 * (last - first) <= most else (1,)
    return [f * 10.0**k for k in range(first, last + 1, step) for f in factors if f * 10.0**k <= high * 1.001]


@dataclass(frozen=True, slots=True)
class Frame:
    """A drawing of `width` by `height` pixels with its axes."""

    width: int
    height: int
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a point, from the top left."""
        across = LEFT + self.x(x) * (self.width - LEFT - RIGHT)
        return round(across, 1), round(self.height - BOTTOM - self.y(y) * (self.height - TOP - BOTTOM), 1)

    def grid(self) -> str:
        """Return the lines at the ticks, their names, and those of the axes."""
        parts, (left, right), bottom = [], (LEFT, self.width - RIGHT), self.height - BOTTOM
        for value, name in self.y.ticks(6):
            y = self.at(self.x.low, value)[1]
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for value, name in self.x.ticks(int((right - left) / TICK_PIXELS)):
            x = self.at(value, self.y.low)[0]
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(name)}</text>')
        middle = (left + right) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>')
        parts.append(f'<text x="0" y="{TOP - 11}">{escape(self.y.label)}</text>')
        return "".join(parts)
