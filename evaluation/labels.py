"""Names beside the points of a plot, where they lie on no other mark."""

from collections.abc import Sequence
from math import dist

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Point = tuple[float, float]
DISTANCES = (7.0, 16.0, 28.0, 42.0)
"""From mark to name in 1/72 inch, the nearest first."""
SIDES = ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, 1), (0, -1))
"""Right or left, above or below."""
MARK = 5.0
"""Half of a mark's width in 1/72 inch."""


def place(figure: Figure, axes: Axes, named: Sequence[tuple[Point, str]], marks: Sequence[Point], size: float = 9) -> None:
    """Write each name near its point, in data coordinates, off all `marks`, off the other names and inside of the axes.

    Of the places that are free, one nearer to no other mark is taken, and of those the nearest; one further off gets a line.
    The axes' limits and the figure's size must be final.
    """
    figure.draw_without_rendering()  # lays the figure out
    dot, inside = figure.dpi / 72, axes.get_window_extent()
    spots = [_pixels(axes, mark) for mark in marks]
    taken = [_around(x, y, MARK * dot, MARK * dot) for x, y in spots]
    for point, name in named:
        x, y = _pixels(axes, point)
        measured = axes.text(0, 0, name, fontsize=size)
        extent = measured.get_window_extent()
        wide, high = extent.width / 2, extent.height / 2
        measured.remove()
        found: list[tuple[int, bool, int, Point, tuple[int, int], Bbox]] = []
        for distance in DISTANCES:
            for right, up in SIDES:
                shift = right * distance, up * distance * (0.5 if right else 1)
                middle = x + shift[0] * dot + right * wide, y + shift[1] * dot + up * high
                box = _around(*middle, wide, high)
                covered = sum(_shared(box, other) for other in taken) + 4 * wide * high - _shared(box, inside)
                mistaken = any(dist(middle, spot) < dist(middle, (x, y)) - 1 for spot in spots)  # for another mark's
                found.append((round(covered), mistaken, len(found), shift, (right, up), box))
        _, _, place, shift, (right, up), box = min(found, key=lambda one: one[:3])
        text = axes.annotate(
            name,
            point,
            xytext=shift,
            textcoords="offset points",
            ha={1: "left", 0: "center", -1: "right"}[right],
            va={1: "bottom", -1: "top"}[up],
            fontsize=size,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 3, "color": mpl.rcParams["text.color"]}
            if place >= len(SIDES)
            else None,
        )
        text.set_in_layout(False)  # or the layout would be another
        taken.append(box)


def _pixels(axes: Axes, point: Point) -> Point:
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def _around(x: float, y: float, wide: float, high: float) -> Bbox:
    return Bbox.from_extents(x - wide, y - high, x + wide, y + high)


def _shared(one: Bbox, other: Bbox) -> float:
    """The area that lies in both."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else float(both.width * both.height)
