"""This module holds the charts, as SVG: lines and rooflines. It does not know what they show."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .axes import Axis, Frame, make_axis
from .markup import NUM_COLOURS, Html, legend, tag
from .numbers import number, quantity

__all__ = ["Ceiling", "Point", "Series", "line_chart", "roofline"]

SIZES = {"wide": (880, 360), "narrow": (360, 300)}
"""Each chart is drawn for either page: text that shrinks with a drawing cannot be read on a phone."""
MAX_DOTS = 60
"""Lines with more points have no dots."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    """What lies around each point, from low to high."""
    bad: Collection[int] = ()
    """Indices of the points to mark."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point under a roof, where y may be unknown."""

    name: str
    group: str
    x: float
    y: float | None
    """None: drawn on the roof, hollow."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a machine can do at most."""

    name: str
    bytes_per_s: float
    flops_per_s: float

    def at(self, flops_per_byte: float) -> float:
        """Return the FLOP/s that this allows."""
        return min(self.flops_per_s, flops_per_byte * self.bytes_per_s)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]] | Sequence[Series],
    *,
    title: str = "",
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_names: Sequence[str] | None = None,
    from_zero: bool = False,
) -> Html:
    """Return lines over x.

    Args:
        series: name -> points, in the order of x; or more of each.
        title: above the chart.
        x_label, y_label: of the axes, with units.
        log_x, log_y: by logarithms; values must be above 0.
        x_names: what to call x = 0, 1, 2, ...
        from_zero: let y begin at 0, however far away that is.
    """
    lines = [Series(name, points) for name, points in series.items()] if isinstance(series, Mapping) else series
    points = [point for line in lines for point in line.points]
    if not points:
        return tag("p", f"{title}: nothing to draw" if title else "nothing to draw")
    x = make_axis(x_label, [x for x, _ in points], is_log=log_x, names=x_names)
    ys = [y for _, y in points] + [y for line in lines for ends in line.band for y in ends]
    y = make_axis(y_label, [*ys, 0.0] if from_zero else ys, is_log=log_y)

    def draw(frame: Frame) -> str:
        return "".join(_line(frame, line, i % NUM_COLOURS) for i, line in enumerate(lines))

    return _figure(title, x, y, draw, [line.name for line in lines if len(lines) > 1])


def _line(frame: Frame, line: Series, colour: int) -> str:
    parts = []
    if line.band:
        xs = [x for x, _ in line.points]
        ends = [*zip(xs, (low for low, _ in line.band), strict=True)]
        ends += reversed([*zip(xs, (high for _, high in line.band), strict=True)])
        parts.append(f'<polygon class="c{colour} band" points="{_pixels(frame, ends)}"/>')
    parts.append(f'<polyline class="c{colour} line" points="{_pixels(frame, _thinned(line.points, frame.width))}"/>')
    dots = enumerate(line.points) if len(line.points) <= MAX_DOTS else ()
    parts += [
        _dot(frame, x, y, f"c{colour}", f"{line.name}: {_named(frame.x, x)}, {number(float(y))}") for _, (x, y) in dots
    ]
    for index in line.bad:
        across, up = frame.at(*line.points[index])
        parts.append(f'<circle class="mark" cx="{across}" cy="{up}" r="8"/>')
    return "".join(parts)


def _thinned(points: Sequence[tuple[float, float]], width: int) -> Sequence[tuple[float, float]]:
    """Return the least and the largest of each stretch, where there are more points than anyone can see."""
    stretch = -(-len(points) // width)
    if stretch <= 2:
        return points
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [
        point
        for part in parts
        for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}, key=lambda p: p[0])
    ]


def _named(axis: Axis, value: float) -> str:
    return axis.names[int(value)] if axis.names is not None else number(float(value))


def _pixels(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in (frame.at(*point) for point in points))


def _dot(frame: Frame, x: float, y: float, kind: str, title: str, radius: float = 3) -> str:
    across, up = frame.at(x, y)
    return f'<circle class="{kind}" cx="{across}" cy="{up}" r="{radius}"><title>{escape(title)}</title></circle>'


def _colour(groups: Sequence[str], point: Point) -> str:
    return f"c{groups.index(point.group) % NUM_COLOURS}"


def roofline(points: Sequence[Point], ceilings: Sequence[Ceiling], *, title: str = "") -> Html:
    """Return FLOP/s over FLOP per byte, both logarithmic, under what machines allow.

    Args:
        points: x in FLOP per byte, y in FLOP/s; without y, a hollow one on the first ceiling: the most it allows.
        ceilings: at least one.
        title: above the chart.
    """
    known = [point for point in points if point.x > 0]
    if not known:
        return tag("p", f"{title}: nothing to draw" if title else "nothing to draw")
    groups = list(dict.fromkeys(point.group for point in known))
    knees = [ceiling.flops_per_s / ceiling.bytes_per_s for ceiling in ceilings]
    heights = [ceilings[0].at(point.x) if point.y is None else point.y for point in known]
    x = make_axis("FLOP per byte", [*(point.x for point in known), *(4 * knee for knee in knees)], is_log=True)
    rates = [*heights, *(1.5 * ceiling.flops_per_s for ceiling in ceilings)]  # room for the names
    y = make_axis("FLOP/s", [each for each in rates if each > 0], is_log=True)

    def draw(frame: Frame) -> str:
        parts = [_roof(frame, ceiling, i) for i, ceiling in enumerate(ceilings)]
        for point, height in zip(known, heights, strict=True):
            kind, what = _colour(groups, point), f"{point.name}: {number(point.x)} FLOP/byte"
            if point.y is None:
                parts.append(_stem(frame, point.x, height, kind))
                title = f"{what}, at most {quantity(height, 'FLOP/s')}"
                parts.append(_dot(frame, point.x, height, f"{kind} hollow", title, 5))
            else:
                parts.append(_dot(frame, point.x, height, kind, f"{what}, {quantity(height, 'FLOP/s')}", 5))
        return "".join(parts)

    return _figure(title, x, y, draw, groups)


def _stem(frame: Frame, x: float, y: float, kind: str) -> str:
    (across, top), (_, bottom) = frame.at(x, y), frame.at(x, frame.y.low)
    return f'<line class="{kind} stem" x1="{across}" x2="{across}" y1="{top}" y2="{bottom}"/>'


def _roof(frame: Frame, ceiling: Ceiling, index: int) -> str:
    """Return the line of a ceiling within the frame, and its name above the flat part."""
    knee = ceiling.flops_per_s / ceiling.bytes_per_s
    first = max(frame.x.low, frame.y.low / ceiling.bytes_per_s)
    corners = [(x, ceiling.at(x)) for x in (first, max(knee, first), frame.x.high)]
    right, up = frame.at(frame.x.high, ceiling.flops_per_s)
    name = escape(ceiling.name)
    return (
        f'<polyline class="roof" points="{_pixels(frame, corners)}"/>'
        f'<text class="note" x="{right}" y="{up - 11 if index == 0 else up + 18}" text-anchor="end">{name}</text>'
    )


def _figure(title: str, x: Axis, y: Axis, draw: Callable[[Frame], str], names: Sequence[str]) -> Html:
    drawings = []
    for kind, (width, height) in SIZES.items():
        frame = Frame(width, height, x, y)
        drawings.append(
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title or y.label)}">{frame.grid()}{draw(frame)}</svg>'
        )
    caption = tag("figcaption", title) if title else ""
    return Html(f"<figure>{caption}{''.join(drawings)}{legend(names)}</figure>")
