"""Pictures of runs and sweeps; each function returns the matplotlib figure.

A run is a :class:`~optax_clipx.History`, the path of a recorded run, or a dict of
columns. The colours can be told apart by colour-blind readers, on light and dark pages.
"""

from .runs.plotting import (
    clip_rate as clip_rate,
    compare as compare,
    heatmap as heatmap,
    histogram as histogram,
    norms as norms,
    overview as overview,
    sweep as sweep,
    sweep_map as sweep_map,
)

__all__ = [
    "clip_rate",
    "compare",
    "heatmap",
    "histogram",
    "norms",
    "overview",
    "sweep",
    "sweep_map",
]
