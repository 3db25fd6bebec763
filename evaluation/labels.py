"""Names beside the points of a plot, where they lie on no other mark."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Point = tuple[float, float]
DISTANCES = (7.0, 14.0, 24.0, 38.0)
"""Points of 1/72 inch from mark to name, the nearest first."""
SIDES = (("left", 1, -1), ("left", 1, 1), ("right", -1, -1), ("right", -1, 1), ("center", 0, 1), ("center", 0, -1))
MARK = 5.0
"""Half of a mark's width in points."""


def place(figure: Figure, axes: Axes, named: Sequence[tuple[Point, str]], marks: Sequence[Point], size: float = 9) -> None:
    """Write each name near its point, in data coordinates, off all `marks`, off the other names and inside of the axes.

    The first place that is free is taken, nearest first; where none is, the one that covers least. A name further off than the
    nearest place gets a thin line to its point. The axes' limits and the figure's size must be final.
    """
    figure.draw_without_rendering()  # lays the figure out
    scale, inside = figure.dpi / 72, axes.get_window_extent()
    half = MARK * scale
    half = MARK * scale
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in map(axes.transData.transform, marks)]
    for point, name in named:
        found = []
        for distance in DISTANCES:
            for align, right, up in SIDES:
                line = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 3} if distance > DISTANCES[0] else None
                text = axes.annotate(
                    name,
                    point,
                    xytext=(right * distance, up * distance * (0.6 if right else 1)),
                    textcoords="offset points",
                    ha=align,
                    va="top" if up < 0 else "bottom",
                    fontsize=size,
                    arrowprops=line,
                )
                box = text.get_window_extent()
                covered = sum(_shared(box, other) for other in taken) + _area(box) - _shared(box, inside)
                found.append((round(covered, 1), len(found), box, text))
                text.remove()
        _, _, box, text = min(found, key=lambda place: place[:2])
        axes.add_artist(text)
        taken.append(box)


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else _area(both)


def _area(box: Bbox) -> float:
    return float(box.width * box.height)
