"""The picture of exploding_gradients.py: loss and gradient norm, step by step."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pictures
from matplotlib.axes import Axes

LABELS = {
    "none": "without clipping",
    "value": "clip_by_value",
    "leaf": "clip_by_leaf_norm",
    "global": "clip_by_global_norm",
    "adaptive": "adaptive_grad_clip",
}


def draw(runs: list[Any], path: Path) -> None:
    """Draws the first two tasks, each without clipping and with one method."""
    by_task: dict[int, list[Any]] = {}
    for run in runs:
        by_task.setdefault(id(run.task), []).append(run)
    columns = list(by_task.values())[:2]
    for theme in ("light", "dark"):
        with pictures.style(theme) as colours:
            size = (5.4 * len(columns), 7)
            figure, axes = plt.subplots(2, len(columns), figsize=size, squeeze=False)
            for (top, bottom), column in zip(axes.T, columns, strict=True):
                draw_column(top, bottom, column, colours)
            figure.tight_layout(rect=(0, 0.04, 1, 1), h_pad=1.6, w_pad=2.0)
            num_seeds = len(runs[0].loss)
            if num_seeds > 1:
                note = (
                    f"Lines: median of {num_seeds} seeds, smoothed where there are many"
                    " steps. Bands: smallest to largest."
                )
                figure.text(0.01, 0.01, note, size=10)
            pictures.save(figure, path, theme)


def colour_of(run: Any, colours: Any) -> str:
    """Orange without clipping, blue with."""
    return colours.lines[1 if run.method == "none" else 0]


def draw_column(top: Axes, bottom: Axes, runs: list[Any], colours: Any) -> None:
    """One task: the loss above, the norm below."""
    methods = {run.method: run for run in runs}
    clipped = methods.get("global") or next(
        (run for run in runs if run.method != "none"), None
    )
    for run in (methods.get("none"), clipped):
        if run is not None:
            draw_series(top, run, "loss", colours)
            draw_series(bottom, run, "norm", colours)
    names = "loss (lower is better)", "gradient norm before clipping"
    for axis, name in zip((top, bottom), names, strict=True):
        axis.set_yscale("log")
        axis.set_ylabel(name)
        axis.set_xlim(1, max(2, runs[0].task.steps))
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    if clipped is not None and clipped.method == "global":
        draw_threshold(bottom, clipped, colours)
    # Room above for the legend, and below for the marks of clipped steps.
    widen(top, above=0.42)
    widen(bottom, below=0.3, above=0.05)
    top.set_title(runs[0].task.title, pad=10)
    bottom.set_xlabel("step")
    top.legend(loc="upper right")


def widen(axis: Axes, below: float = 0.0, above: float = 0.0) -> None:
    """Adds fractions of the height of a logarithmic axis below and above."""
    low, high = np.log10(axis.get_ylim())
    height = high - low
    axis.set_ylim(10 ** (low - below * height), 10 ** (high + above * height))


def draw_series(axis: Axes, run: Any, name: str, colours: Any) -> None:
    """The median over seeds, a band around it, and a cross where it ends."""
    colour = colour_of(run, colours)
    values = run.history[name]
    finite = np.isfinite(values).all(0)
    end = values.shape[1] if finite.all() else int(finite.argmin())
    if end == 0:
        return
    steps, shown = np.arange(1, end + 1), smooth(values[:, :end])
    band = values[:, :end] if name == "norm" else shown
    axis.fill_between(steps, band.min(0), band.max(0), color=colour, alpha=0.22, lw=0)
    median = np.median(shown, 0)
    label = f"{LABELS[run.method]}: {score(run)}"
    axis.plot(steps, median, color=colour, lw=2, label=label)
    if end < values.shape[1]:
        axis.plot(end, median[-1], "X", color=colour, ms=12, mec=colours.page, zorder=5)
        axis.annotate(
            f"infinite or NaN\nfrom step {end + 1} on",
            (end, median[-1]),
            xytext=(12, 0),
            textcoords="offset points",
            va="top",
            weight="bold",
        )


def score(run: Any) -> str:
    """The median score in words."""
    value, name = np.median(run.score), run.task.score_name.split(" (")[0]
    return f"{name} {value:.2f}" if np.isfinite(value) else f"{name} not finite"


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """A running median of long series, as each step sees other examples."""
    if values.shape[1] < 20 * width:
        return values
    padded = np.pad(values, ((0, 0), (width // 2, width // 2)), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, 1), -1)


def draw_threshold(axis: Axes, run: Any, colours: Any) -> None:
    """The threshold as a line, and a mark below for each step that was clipped."""
    axis.axhline(run.limit, color=colours.limit, lw=1.4, ls="--", zorder=4)
    axis.annotate(
        f"threshold {run.limit:g}",
        (0.01, run.limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
    )
    steps = np.flatnonzero(run.history["norm"][0] > run.limit) + 1
    below = axis.get_xaxis_transform()
    height = np.full(len(steps), 0.035)
    axis.plot(steps, height, "|", color=colours.clipped, ms=9, transform=below)
    clip_rate = len(steps) / run.task.steps
    axis.text(
        0.99,
        0.075,
        f"clipped steps of the first seed: {clip_rate:.0%}",
        transform=axis.transAxes,
        ha="right",
    )
