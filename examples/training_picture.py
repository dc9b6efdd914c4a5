"""The picture of exploding_gradients.py: loss and gradient norm, step by step."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # draws files, opens no windows

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Orange and blue are told apart by everyone (Okabe and Ito's palette).
COLOURS = {"without": "#D55E00", "with": "#0072B2"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "axes.grid": True,
    "grid.color": "0.92",
}
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
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(columns), figsize=(5.2 * len(columns), 6.6), squeeze=False
        )
        for (top, bottom), column in zip(axes.T, columns, strict=True):
            draw_column(top, bottom, column)
        figure.tight_layout(h_pad=1.6, w_pad=2.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_column(top: Axes, bottom: Axes, runs: list[Any]) -> None:
    """One task: the loss above, the norm below."""
    methods = {run.method: run for run in runs}
    clipped = methods.get("global") or next(
        (run for run in runs if run.method != "none"), None
    )
    for run in (methods.get("none"), clipped):
        if run is None:
            continue
        colour = COLOURS["without" if run.method == "none" else "with"]
        draw_series(top, run, "loss", colour)
        draw_series(bottom, run, "norm", colour)
    if clipped is not None and clipped.method == "global":
        draw_limit(bottom, clipped)
    top.set_title(runs[0].task.title)
    for axis, name in ((top, "loss"), (bottom, "gradient norm before clipping")):
        axis.set_yscale("log")
        axis.set_ylabel(name)
        axis.set_xlim(1, runs[0].task.steps)
    bottom.set_xlabel("step")
    top.legend(loc="center right")


def draw_series(axis: Axes, run: Any, name: str, colour: str) -> None:
    """The median over seeds, a band around it, and a cross where it ends."""
    values = run.history[name]
    values = np.where(np.isfinite(values), values, np.nan)
    count = np.flatnonzero(np.isfinite(values).all(0))
    end = len(count) if len(count) < values.shape[1] else values.shape[1]
    steps = np.arange(1, end + 1)
    kept = smooth(values[:, :end]) if name == "loss" else values[:, :end]
    axis.fill_between(steps, kept.min(0), kept.max(0), color=colour, alpha=0.2, lw=0)
    axis.plot(steps, np.median(kept, 0), color=colour, lw=1.8, label=LABELS[run.method])
    if end < values.shape[1]:
        height = np.median(kept[:, -1])
        axis.plot(end, height, "X", color=colour, ms=11, mec="white", zorder=5)
        axis.annotate(
            f"not finite from step {end + 1} on",
            (end, height),
            xytext=(10, -2),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """A running median of long series, as each step sees other examples."""
    if values.shape[1] < 20 * width:
        return values
    padded = np.pad(values, ((0, 0), (width // 2, width // 2)), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, 1), -1)


def draw_limit(axis: Axes, run: Any) -> None:
    """The limit as a line, and a mark below for each step that was clipped."""
    axis.axhline(run.limit, color="black", lw=1.2, ls="--")
    clipped = run.history["norm"][0] > run.limit
    steps = np.flatnonzero(clipped) + 1
    axis.plot(
        steps,
        np.full(len(steps), 0.03),
        "|",
        color=COLOURS["with"],
        transform=axis.get_xaxis_transform(),
    )
    axis.annotate(
        f"limit {run.limit:g}",
        (1, run.limit),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
    )
