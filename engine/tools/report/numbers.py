"""This module holds how numbers are written for people. It does not know what they count."""

from __future__ import annotations

import math

__all__ = ["duration", "number", "quantity"]

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def number(value: float) -> str:
    """Return a number with three significant digits, more only before the point: 0.0123, 1.23, 12,345."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(2 - exponent, 0)}f}" if -5 < exponent < 15 else f"{value:.2e}"


def quantity(value: float, unit: str = "") -> str:
    """Return a number with a decimal prefix and its unit: 3.35 TB/s, 12.0 µs."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g} {unit}".strip()
    size, prefix = next((each for each in _PREFIXES if float(f"{abs(value):.3g}") >= each[0]), (1e-9, "n"))
    return f"{number(float(value / size))} {prefix}{unit}".strip()


def duration(seconds: float) -> str:
    """Return seconds in the unit that fits: 12.3 µs, 4.56 ms, 7.89 s, 3 min 20 s."""
    if abs(seconds) < 120:
        return quantity(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s"
