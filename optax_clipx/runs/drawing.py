"""How pictures look, and how a million steps become a thousand points."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from . import naming, readers
from .jsonl import ReadError
from .missing import missing
from .table import STEP, Columns, present

DASHES = ("solid", "dashed", "dotted")  # where there are more runs than colours
POINTS = 1000  # more than the pixels of a line at README width


class Theme(NamedTuple):
    """Colours that everyone can tell apart (Okabe and Ito), on a light or dark page.

    ``lines`` are the colours of runs, the same in pictures and on the page. Clipped and
    skipped steps have colours that no run has.
    """

    page: str
    text: str
    grid: str
    norm: str
    limit: str
    clipped: str
    skipped: str
    lines: tuple[str, ...]


THEMES = {
    "light": Theme(
        page="#ffffff",
        text="#1f2328",
        grid="#e4e7eb",
        norm="#0072B2",
        limit="#1f2328",
        clipped="#D55E00",
        skipped="#009E73",
        lines=("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#6E7781", "#8A6D3B"),
    ),
    "dark": Theme(
        page="#0d1117",
        text="#e6edf3",
        grid="#2b313a",
        norm="#56B4E9",
        limit="#e6edf3",
        clipped="#E69F00",
        skipped="#2CC59B",
        lines=("#56B4E9", "#F0E442", "#E29AC5", "#3F8CC9", "#9AA4B2", "#C9A66B"),
    ),
}


def theme_of(name: str) -> Theme:
    """The theme of a name."""
    if name not in THEMES:
        raise ValueError(f"Expected theme to be 'light' or 'dark', got {name!r}.")
    return THEMES[name]


@contextmanager
def canvas(
    theme: str, ax: Any = None, size: tuple[float, float] = (8.0, 3.4)
) -> Iterator[tuple[Any, Any, Theme]]:
    """A figure and axes to draw on: new ones, or those that are given."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(missing("matplotlib")) from None
    colours = theme_of(theme)
    with mpl.rc_context(rc(theme)):
        if ax is None:
            # No pyplot: nothing is registered, so nothing has to be closed.
            figure = Figure(figsize=size, layout="constrained")
            ax = figure.add_subplot()
        yield ax.figure, ax, colours


def rc(theme: str) -> Any:
    """Matplotlib's settings for all pictures of this package, its docs and examples."""
    colours = theme_of(theme)
    return {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": colours.page,
        "figure.facecolor": colours.page,
        "figure.dpi": 150,
        "legend.facecolor": colours.page,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "legend.fontsize": 10,
        "grid.color": colours.grid,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.titlecolor"), colours.text
        ),
        **dict.fromkeys(("xtick.color", "ytick.color"), colours.text),
        "axes.edgecolor": colours.text,
    }


def columns_of(run: Any) -> Columns:
    """The columns of a history, a recorded file, or a mapping; always with a step."""
    if isinstance(run, Mapping):
        columns = {name: np.asarray(x) for name, x in run.items()}
        if STEP not in columns and columns:
            columns[STEP] = np.arange(len(next(iter(columns.values()))))
    else:
        columns = readers.columns_of_run(run)
    if not columns or not len(columns[STEP]):
        raise ReadError("There are no records to draw. Was anything appended?")
    for name, values in columns.items():
        if values.ndim != 1:
            raise ValueError(
                f"Expected one number a step in {name!r}, got shape {values.shape}."
                " Seeds are runs of their own: draw one, {name: x[:, 0] for name, x in"
                " columns.items()}, or pass compare a list of them, one for each seed."
            )
    return columns


@runtime_checkable
class Sweep(Protocol):
    """What the pictures of a sweep show, as `find_threshold` returns it."""

    @property
    def best(self) -> float:
        """The best threshold."""
        ...

    @property
    def best_learning_rate(self) -> float | None:
        """Its learning rate, or `None`."""
        ...

    @property
    def limits(self) -> tuple[float, ...]:
        """The thresholds tried, rising."""
        ...

    @property
    def learning_rates(self) -> tuple[float | None, ...]:
        """The learning rates tried."""
        ...

    @property
    def scores(self) -> np.ndarray:
        """Thresholds by learning rates by seeds; NaN where training failed."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """What a good score is."""
        ...

    @property
    def warning(self) -> str:
        """What speaks against the result."""
        ...


class Norms(NamedTuple):
    """The recorded norms, their thresholds, and which steps were clipped or skipped."""

    steps: np.ndarray
    norms: np.ndarray
    limits: np.ndarray | None
    clipped: np.ndarray | None
    skipped: np.ndarray | None

    @property
    def rate(self) -> float | None:
        """The fraction of clipped steps."""
        return None if self.clipped is None else float(np.mean(self.clipped))

    @property
    def skip_rate(self) -> float | None:
        """The fraction of skipped steps."""
        return None if self.skipped is None else float(np.mean(self.skipped))


def norms_of(run: Any, norm: str | None, limit: float | int | None) -> Norms:
    """What the pictures of norms show: the steps of which a norm was recorded."""
    columns = naming.with_whole_norm(columns_of(run))
    name = naming.pick(columns, "norm", norm)
    norms = naming.norms_of_all_steps(columns, name)
    there = present(norms)
    if not there.any():
        raise ReadError(f"There are no norms in {name!r}. Name another column.")

    def beside(last: str) -> np.ndarray | None:
        other = f"{name.removesuffix('norm')}{last}"
        if not name.endswith("norm") or other not in columns:
            return None
        return np.asarray(columns[other], np.float64)[there]

    norms = norms[there]
    skipped = None
    if "skip/skipped" in columns:
        skipped = np.asarray(columns["skip/skipped"], np.float64)[there] > 0
    limits = naming.limits_beside(columns, name)
    limits = None if limits is None else limits[there]
    flags = beside("clipped") if limits is not None else None
    if limit is not None:
        limits, flags = np.full(len(norms), float(limit)), None
    clipped = None
    if limits is not None and (limit is not None or not name.startswith("skip/")):
        clipped = norms > limits
        if flags is not None:
            clipped = np.where(present(flags), flags > 0, clipped)
        if skipped is not None:  # the clipper's figures are those of a step before
            clipped &= ~skipped
    return Norms(columns[STEP][there], norms, limits, clipped, skipped)


class Envelope(NamedTuple):
    """Smallest, middle and largest value of each stretch of steps."""

    steps: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def envelope(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> Envelope:
    """Values as few enough points to draw; unchanged where there are few."""
    values = np.where(np.isfinite(values), values, np.nan)
    each = -(-len(values) // points)
    if each <= 1:
        return Envelope(steps, values, values, values)
    blocks = _blocks(values, each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # stretches of NaN stay NaN
        return Envelope(
            steps[::each],
            np.nanmin(blocks, axis=1),
            np.nanmedian(blocks, axis=1),
            np.nanmax(blocks, axis=1),
        )


def means(values: np.ndarray, points: int) -> tuple[np.ndarray, int]:
    """The mean of each stretch, NaN left out, and how long the stretches are."""
    each = max(1, -(-len(values) // points))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(_blocks(values.astype(np.float64), each), axis=1), each


def _blocks(values: np.ndarray, each: int) -> np.ndarray:
    missing = -len(values) % each
    return np.append(values, [np.nan] * missing).reshape(-1, each)


def bins(norms: np.ndarray, count: int) -> np.ndarray:
    """The edges of bars as wide as those that cut 98% of the norms into so many.

    There are as many more on either side as the others take, up to the same number; a
    norm of 1e37 must not press the rest into one bar.
    """
    low, high = np.log(np.quantile(norms, [0.01, 0.99])) + np.log([0.95, 1.05])
    width = (high - low) / count
    beyond = [low - np.log(norms.min()), np.log(norms.max()) - high]
    before, after = np.clip(np.ceil(np.divide(beyond, width)), 0, count).astype(int)
    return np.exp(low + width * np.arange(-before, count + after + 1))
