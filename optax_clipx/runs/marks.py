"""Lines, bands, dots and crosses: what pictures are put together from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import naming
from .drawing import Envelope, Norms, Theme, columns_of, envelope
from .jsonl import ReadError
from .naming import counted
from .table import STEP, present

_HATCH = "#8c959f"  # seen on a light page and on a dark one
_LINE = 16  # points from one line of a legend to the next
_BESIDE_LABEL = 40  # points for the handle of a label and the space around both


def line(
    ax: Any,
    points: Envelope,
    colour: str,
    label: str,
    **style: Any,
) -> None:
    """A line through the middles, with a band from low to high.

    A value between two that are missing is a dot, as no line leads to it.
    """
    if not np.array_equal(points.low, points.high, equal_nan=True):
        band = {"color": colour, "alpha": 0.25, "lw": 0}
        ax.fill_between(points.steps, points.low, points.high, **band)
    ax.plot(
        points.steps, points.middle, color=colour, label=label, **{"lw": 1.3} | style
    )
    there = np.isfinite(np.pad(points.middle, 1, constant_values=np.nan))
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    if alone.any() and "marker" not in style:
        ax.plot(points.steps[alone], points.middle[alone], ".", color=colour)


def clipped_dots(ax: Any, seen: Norms, colours: Theme) -> None:
    """Dots on the clipped steps, and their fraction in the legend."""
    if seen.clipped is None or not seen.clipped.any():
        return
    dots = envelope(seen.steps, np.where(seen.clipped, seen.norms, np.nan))
    style = {"color": colours.clipped, "ms": 4, "zorder": 3}
    label = f"clipped: {seen.rate:.1%} of steps"
    ax.plot(dots.steps, dots.high, ".", label=label, **style)


def skipped_marks(ax: Any, seen: Norms, colours: Theme) -> None:
    """Triangles on the skipped steps, and their fraction in the legend."""
    if seen.skipped is None or not seen.skipped.any():
        return
    marks = envelope(seen.steps, np.where(seen.skipped, seen.norms, np.nan))
    style = {"color": colours.skipped, "ms": 6, "mec": colours.page, "zorder": 3.5}
    label = f"skipped: {seen.skip_rate:.1%} of steps"
    ax.plot(marks.steps, marks.high, "v", label=label, **style)


def threshold(ax: Any, seen: Norms, colours: Theme) -> None:
    """The threshold over the steps; an infinite one is said in the legend alone."""
    if seen.limits is None:
        return
    style = {"color": colours.limit, "lw": 1.3, "ls": (0, (5, 2))}
    if not np.isfinite(seen.limits).any():
        ax.plot([], [], label="threshold: infinite", **style)
        return
    limits = envelope(seen.steps, seen.limits)
    ax.plot(limits.steps, limits.middle, label="threshold", zorder=4, **style)


def limit_line(ax: Any, limits: np.ndarray, colours: Theme) -> None:
    """The usual threshold as a vertical line, with a band where it varied."""
    limits = limits[np.isfinite(limits)]
    if not len(limits):
        return
    low, middle, high = np.quantile(limits, [0.05, 0.5, 0.95])
    if high > 1.02 * low:
        style = {"color": colours.limit, "alpha": 0.15, "lw": 0, "zorder": 0.5}
        ax.axvspan(low, high, label="the threshold lay here in 90% of steps", **style)
    style = {"color": colours.limit, "lw": 1.3, "ls": (0, (5, 2))}
    median = "median " if high > 1.02 * low else ""
    ax.axvline(middle, label=f"{median}threshold {middle:.3g}", **style)


def mark_nonfinite(
    ax: Any, steps: np.ndarray, values: np.ndarray, colours: Theme
) -> None:
    """Crosses at the top on the steps whose value is not finite."""
    lost = steps[~np.isfinite(values)]
    if len(lost):
        few = lost[:: -(-len(lost) // 200)]
        ax.plot(few, [0.97] * len(few), "x", color=colours.clipped, mew=2, zorder=5,
                transform=ax.get_xaxis_transform(),
                label=f"non-finite: {counted(len(lost), 'step')}")  # fmt: skip


def log_scale(ax: Any, values: np.ndarray) -> None:
    """A logarithmic axis, where the values allow it."""
    finite = values[np.isfinite(values)]
    if len(finite) and (finite >= 0).all() and (finite > 0).any():
        ax.set_yscale("log", nonpositive="mask")
        _label_plainly(ax.yaxis, *ax.get_ylim())


def log_axis(ax: Any, edges: np.ndarray) -> None:
    """A logarithmic axis of the bars of a histogram."""
    ax.set_xscale("log")
    _label_plainly(ax.xaxis, *ax.get_xlim())


def _label_plainly(axis: Any, low: float, high: float) -> None:
    """A few plain numbers on a logarithmic axis from low to high, if these are near."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    if high >= 1000 * low:
        return
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    if high < 3 * low:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_formatter(NullFormatter())


def with_outermost(label: str, values: np.ndarray, edges: np.ndarray) -> str:
    """The label of an axis, with the values that are beyond it."""
    if values.min() < edges[0]:
        label += f" (first bar: down to {values.min():.3g})"
    if values.max() > edges[-1]:
        label += f" (last bar: up to {values.max():.3g})"
    return label


def align_titles(ax: Any, other: Any) -> None:
    """Puts the titles of two axes on one height; one may have a legend below it."""
    pads = [x.titleOffsetTrans.transform((0, 0))[1] * 72 / x.figure.dpi
            for x in (ax, other)]  # fmt: skip
    for x in (ax, other):
        x.set_title(x.get_title(loc="left"), loc="left", pad=max(pads))


def legend_above(ax: Any, below_title: bool = False) -> None:
    """A legend between the title and the axes, in as many columns as there is room for.

    It stands beside the title if both fit on one line, unless it is to be below.
    """
    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    room = ax.bbox.width / ax.figure.dpi * 72  # in points, as the sizes of fonts
    if ax.figure.figure.get_layout_engine() is not None:
        room *= 1.15  # axes become wider in the layout, which is not computed yet
    columns = len(labels)
    while columns > 1 and _width(labels, columns) > room:
        columns -= 1
    rows = -(-len(labels) // columns)
    title = ax.get_title(loc="left")
    beside = _text_width(title, 12, bold=True) + _width(labels, columns) < 0.95 * room
    beside &= rows == 1 and not below_title
    if not beside:
        ax.set_title(title, loc="left", pad=10 + _LINE * rows)
    place = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "borderaxespad": 0.2}
    if not beside:
        place |= {"loc": "lower left", "bbox_to_anchor": (0, 0.99)}
    style = {"columnspacing": 1.2, "handlelength": 1.6, "labelspacing": 0.3}
    ax.legend(ncols=columns, **style, **place)


def _width(labels: Sequence[str], columns: int) -> float:
    """How wide a legend is, in points; it is filled column by column."""
    widths = np.array([_BESIDE_LABEL + _text_width(label, 10) for label in labels])
    return float(sum(part.max() for part in np.array_split(widths, columns)))


def _text_width(text: str, size: int, bold: bool = False) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width)


def log_norm(values: np.ndarray) -> Any:
    """Colours on a logarithmic scale, or `None` where one value says all."""
    from matplotlib.colors import LogNorm

    positive = values[values > 0]
    if not len(positive) or positive.min() == positive.max():
        return None
    return LogNorm(float(positive.min()), float(positive.max()))


def empty_cells(ax: Any, image: Any, table: np.ndarray, zero: str, page: Theme) -> None:
    """Hatched cells for zeros, empty ones for what is no number, and their legend.

    The colours have no place for zero: their scale is logarithmic. Grey alone would be
    taken for a norm in the middle of the scale.
    """
    ax.patch.set(facecolor=page.grid, hatch="////", edgecolor=_HATCH)
    lost = ~np.isfinite(table)
    style = {"aspect": "auto", "interpolation": "nearest", "extent": image.get_extent()}
    if lost.any():
        from matplotlib.colors import ListedColormap

        ax.imshow(np.where(lost, 0, np.nan), cmap=ListedColormap([page.page]), **style)
    for label, some, looks in (
        (zero, table == 0, {"fc": page.grid, "hatch": "////", "ec": _HATCH}),
        ("not finite or not recorded", lost, {"fc": page.page, "ec": page.text}),
    ):
        if some.any():
            ax.fill([], [], label=label, lw=0.8, **looks)
    legend_above(ax, below_title=True)  # beside the colour bar there is less room


def seed_band(seeds: Sequence[Any], column: str) -> tuple[Envelope, np.ndarray]:
    """Median and range of several runs, and where runs stop being finite."""
    lines, lost = [], []
    for seed in seeds:
        columns = columns_of(seed)
        name = column if column in columns else naming.pick(columns, column)
        values = np.asarray(columns[name], np.float64)
        recorded = present(values)
        if not recorded.any():
            raise ReadError(f"There is no value in {name!r} of one of the runs.")
        steps, values = columns[STEP][recorded], values[recorded]
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad) and len(bad) == len(values) - bad[0]:
            lost.append(steps[bad[0]])
        lines.append(envelope(steps, values, 300))
    if len(lines) == 1:
        return lines[0], np.array(lost)
    steps = max((line.steps for line in lines), key=len)
    table = np.stack([np.interp(steps, x.steps, x.middle, right=np.nan) for x in lines])
    return (
        Envelope(
            steps,
            np.array([of_finite(np.min, x) for x in table.T]),
            np.array([of_finite(np.median, x) for x in table.T]),
            np.array([of_finite(np.max, x) for x in table.T]),
        ),
        np.array(lost),
    )


def leave_out_explosions(ax: Any, lines: Sequence[np.ndarray]) -> None:
    """Ends the axis where a run that explodes would press the others flat."""
    starts = [x[np.isfinite(x)] for x in lines]
    starts = [x for x in starts if len(x)]
    if not starts or ax.get_yscale() != "log":
        return
    top = 1e3 * max(float(x[0]) for x in starts)
    bottom = min(float(x[x > 0].min()) for x in starts if (x > 0).any())
    if max(float(x.max()) for x in starts) > top > bottom:
        ax.set_ylim(bottom / 2, top)


def of_finite(reduce: Any, values: np.ndarray) -> float:
    """A reduction of the finite values, or NaN."""
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else np.nan


def middle(scores: np.ndarray) -> float:
    """The median over seeds; NaN if most of them failed."""
    middle = np.median(np.where(np.isfinite(scores), scores, np.inf))
    return float(middle) if np.isfinite(middle) else np.nan


def cell(
    ax: Any, column: int, row: int, value: float, image: Any, colours: Theme
) -> None:
    """The number in a cell of a map, or a cross."""
    place = {"ha": "center", "va": "center", "fontsize": 9}
    if not np.isfinite(value):
        ax.text(column, row, "✕", color=colours.clipped, **place)
        return
    red, green, blue, _ = image.cmap(image.norm(value))
    bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
    ax.text(column, row, f"{value:.3g}", color="black" if bright else "white", **place)
