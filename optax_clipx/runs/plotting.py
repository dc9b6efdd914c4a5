"""Pictures of runs and sweeps; each function returns the matplotlib figure.

A run is a :class:`~optax_clipx.History`, the path of a recorded run, or a dict of
columns. The colours can be told apart by colour-blind readers, on light and dark pages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import marks, naming
from .drawing import (
    DASHES,
    Envelope,
    Sweep,
    bins,
    canvas,
    columns_of,
    envelope,
    means,
    norms_of,
)
from .escaping import for_picture
from .jsonl import ReadError
from .table import STEP, present


def norms(
    run: Any,
    *,
    norm: str | None = None,
    limit: float | int | None = None,
    theme: str = "light",
    ax: Any = None,
) -> Any:
    """Draws the norms before clipping over the steps, with threshold and clipped steps.

    Skipped steps and clipped steps have different marks. A long run is cut into groups
    of neighbouring steps, and the picture shows the median and the range of each group.

    Args:
        run: a :class:`~optax_clipx.History`, the path of a recorded run, or a dict of
            columns.
        norm: the column with the norms. You need it only if the column has an unusual
            name.
        limit: the threshold to draw. By default it is the recorded threshold.
        theme: ``"light"`` or ``"dark"``.
        ax: the matplotlib axes to draw on. By default, new axes are made.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there are no norms in the run.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> figure = plotting.norms({"clip/norm": [1.0, 3.0, 2.0]}, limit=2.5)
        >>> len(figure.axes)
        1

    References:
        Pascanu et al., 2013, arXiv 1211.5063, choose a threshold from the norms.
    """
    seen = norms_of(run, norm, limit)
    with canvas(theme, ax) as (figure, ax, colours):
        points = envelope(seen.steps, seen.norms)
        marks.line(ax, points, colours.norm, "norm")
        marks.threshold(ax, seen, colours)
        marks.clipped_dots(ax, seen, colours)
        marks.skipped_marks(ax, seen, colours)
        marks.mark_nonfinite(ax, seen.steps, seen.norms, colours)
        marks.log_scale(ax, seen.norms)
        ax.set(title="Gradient norm before clipping", xlabel="step", ylabel="norm")
        marks.legend_above(ax)
    return figure


def clip_rate(
    run: Any,
    *,
    norm: str | None = None,
    limit: float | int | None = None,
    theme: str = "light",
    ax: Any = None,
) -> Any:
    """Draws the fraction of clipped steps and of skipped steps over a run.

    The run is cut into parts of equal length. Each bar is the fraction in one part.

    Args:
        run: as for :func:`norms`.
        norm: as for :func:`norms`.
        limit: as for :func:`norms`.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if the run has no threshold and you pass no ``limit``.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> figure = plotting.clip_rate({"clip/norm": [1.0, 3.0, 2.0]}, limit=2.5)
        >>> figure.axes[0].get_ylabel()
        'clipped steps'

    References:
        Pascanu et al., 2013, arXiv 1211.5063.
    """
    seen = norms_of(run, norm, limit)
    flags = {"clipped": seen.clipped, "skipped": seen.skipped}
    known = {what: given for what, given in flags.items() if given is not None}
    if not known:
        raise ReadError(
            "There is no threshold in this run to compare the norms with. Pass limit=."
        )
    with canvas(theme, ax) as (figure, ax, colours):
        top = 0.0
        for what, given in known.items():
            part, each = means(given, min(80, max(1, len(seen.steps) // 10)))
            edges = np.append(seen.steps[::each], seen.steps[-1] + 1)
            colour = getattr(colours, what)
            ax.stairs(part, edges, color=colour, fill=True, alpha=0.3)
            ax.stairs(part, edges, color=colour, lw=1.6, label=what)
            if what == "clipped":
                ax.axhline(seen.rate, color=colours.limit, lw=1.3, ls=(0, (5, 2)))
            top = max(top, np.nanmax(part))
        ax.set_ylim(0, max(0.02, min(1.0, 1.15 * top)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
        ax.set(xlabel="step", ylabel=f"{' and '.join(known)} steps")
        said = "; ".join(f"{what}: {np.mean(x):.1%}" for what, x in known.items())
        if len(known) == 1:
            said += " of all steps" + (" (dashed)" if "clipped" in known else "")
        ax.set_title(said.capitalize())
        if len(known) > 1:
            marks.legend_above(ax)
    return figure


def histogram(
    run: Any,
    *,
    norm: str | None = None,
    limit: float | int | None = None,
    theme: str = "light",
    ax: Any = None,
) -> Any:
    """Draws a histogram of the norms, with the threshold.

    The histogram contains all steps. The first and the last bar also contain norms that
    are very far from the others. The label of the axis then names the smallest or the
    largest norm.

    Args:
        run: as for :func:`norms`.
        norm: as for :func:`norms`.
        limit: as for :func:`norms`.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there is no positive finite norm in the run.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> figure = plotting.histogram({"clip/norm": [1.0, 3.0, 2.0]}, limit=2.5)
        >>> figure.axes[0].get_xscale()
        'log'

    References:
        Heavy tails of gradient norms: Zhang et al., Why are adaptive methods good for
        attention models?, 2020, arXiv 1912.03194.
    """
    seen = norms_of(run, norm, limit)
    usable = np.isfinite(seen.norms) & (seen.norms > 0)
    if not usable.any():
        raise ReadError("There is no positive finite norm in this run.")
    with canvas(theme, ax) as (figure, ax, colours):
        shown = seen.norms[usable]
        count = int(np.clip(len(shown) ** 0.5, 12, 60))
        edges = bins(shown, count)
        shown = np.clip(shown, edges[0], edges[-1])
        none = np.zeros(len(shown), bool)
        clipped = none if seen.clipped is None else seen.clipped[usable]
        skipped = none if seen.skipped is None else seen.skipped[usable]
        known = seen.limits is not None or seen.skipped is not None
        base = np.zeros(len(edges) - 1)
        for label, colour, chosen in (
            ("unchanged" if known else "norms", colours.norm, ~clipped & ~skipped),
            ("clipped", colours.clipped, clipped),
            ("skipped", colours.skipped, skipped),
        ):
            if chosen.any():
                top = base + np.histogram(shown[chosen], edges)[0] / len(shown)
                style = {"color": colour, "fill": True, "label": label}
                ax.stairs(top, edges, baseline=base, **style)
                base = top
        if seen.limits is not None:
            marks.limit_line(ax, seen.limits, colours)
        marks.log_axis(ax, edges)
        title = "Norms and the threshold"
        if seen.limits is None:
            title = "Norms; the threshold is not recorded"
        elif not np.isfinite(seen.limits).any():
            title = "Norms; the threshold is infinite"
        ax.set(title=title, ylabel="fraction of steps")
        ax.set_xlabel(marks.with_outermost("norm", seen.norms[usable], edges))
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
        marks.legend_above(ax)
    return figure


def heatmap(
    run: Any,
    *,
    prefix: str | None = None,
    theme: str = "light",
    ax: Any = None,
) -> Any:
    """Draws the norm of each layer over the steps: a colour shows the size of the norm.

    Hatched cells have the norm 0: the layer has no gradient. Empty cells have a norm
    that is not finite, or no norm was recorded.

    Args:
        run: as for :func:`norms`. It needs columns such as
            ``"track_norms/layers/0/kernel"``, which :func:`optax_clipx.track_norms`
            records.
        prefix: the first part of the names of these columns. The default is
            ``"track_norms/"``. ``"track_ratios/"`` draws the update-to-parameter
            ratios. ``"track_rms_t/"`` draws the gradients divided by the square root
            of the optimizer's second moment.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there are no such columns.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> run = {"track_norms/a": [1.0, 2.0], "track_norms/b": [0.1, 0.2]}
        >>> len(plotting.heatmap(run).axes[0].get_yticklabels())
        2

    References:
        Gradients of each layer: Glorot and Bengio, Understanding the difficulty of
        training deep feedforward neural networks, 2010.
    """
    columns = columns_of(run)
    start = "track_norms/" if prefix is None else prefix
    names = [name for name in columns if name.startswith(start)]
    if not names:
        raise ReadError(
            f"There are no columns that begin with {start!r}. Record them with"
            " optax_clipx.track_norms, or pass prefix=."
        )
    # Layers may be recorded less often than the rest.
    rows = np.any([present(columns[name]) for name in names], axis=0)
    if not rows.any():
        raise ReadError(
            f"There are no values in the columns that begin with {start!r}."
        )
    steps = columns[STEP][rows]
    size = (8.0, min(10.0, 1.4 + 0.27 * len(names)))
    with canvas(theme, ax, size) as (figure, ax, colours):
        lines = [envelope(steps, columns[name][rows], 400) for name in names]
        table = np.stack([line.middle for line in lines])
        positive = table[np.isfinite(table) & (table > 0)]
        image = ax.imshow(
            np.where(table > 0, table, np.nan),
            norm=marks.log_norm(positive),
            cmap="cividis",
            aspect="auto",
            interpolation="nearest",
            extent=(steps[0], steps[-1] + 1, len(names) - 0.5, -0.5),
        )
        shown = [for_picture(name.removeprefix(start)) for name in names]
        every = max(1, -(-len(names) // 32))
        ax.set_yticks(range(0, len(names), every), shown[::every], fontsize=9)
        ax.grid(False)
        what, label, zero = "Gradient norm", "norm", "no gradient"
        if "ratio" in start:
            what, label, zero = "Update-to-parameter ratio", "ratio", "no update"
        elif "rms_t" in start:
            what, label = "Gradient to second moment (RMS)", "RMS"
        ax.set(title=f"{what} of each layer", xlabel="step")
        marks.empty_cells(ax, image, table, zero, colours)
        figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05, label=label)
    return figure


def compare(
    runs: Mapping[str, Any],
    *,
    column: str | Sequence[str] = "loss",
    theme: str = "light",
    ax: Any = None,
) -> Any:
    """Draws a column of several runs, such as the loss with and without clipping.

    Args:
        runs: a dict from labels to runs. A run is as for :func:`norms`. For several
            seeds, pass a list of runs under one label: their median and range are
            drawn.
        column: the name of the column to draw. You can also pass only the last part of
            the name, such as ``"loss"`` for ``"train/loss"``. For several columns, pass
            a list of names, such as ``["loss", "norm"]``. Each column has its own
            panel.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`. It is used for one column only.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there are no runs, a run has no such column, or you pass ``ax``
            with several columns.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> runs = {"without": {"loss": [3.0, 9.0]}, "with": {"loss": [3.0, 2.0]}}
        >>> figure = plotting.compare(runs)
        >>> figure.axes[0].get_ylabel()
        'loss'

    References:
        The need for several seeds: Henderson et al., Deep reinforcement learning that
        matters, 2018, arXiv 1709.06560.
    """
    if not runs:
        raise ReadError("There are no runs to compare.")
    columns = [column] if isinstance(column, str) else list(column)
    if len(columns) == 1:
        return _compare(runs, columns[0], theme, ax)
    if ax is not None or not columns:
        raise ReadError(
            f"Expected one column to draw on ax, got {columns}. Leave ax= out, or draw"
            " one column at a time."
        )
    with canvas(theme, size=(8.0, 3.6 * len(columns))) as (figure, first, _):
        first.remove()
        for name, panel in zip(columns, figure.subplots(len(columns)), strict=True):
            _compare(runs, name, theme, panel)
    return figure


def _compare(runs: Mapping[str, Any], column: str, theme: str, ax: Any) -> Any:
    """One column of several runs."""
    with canvas(theme, ax, (8.0, 4.0)) as (figure, ax, colours):
        drawn: dict[str, Envelope] = {}
        for index, (label, given) in enumerate(runs.items()):
            seeds = list(given) if isinstance(given, list | tuple) else [given]
            colour = colours.lines[index % len(colours.lines)]
            dash = DASHES[index // len(colours.lines) % len(DASHES)]
            band, lost = marks.seed_band(seeds, column)
            shown = for_picture(label)
            shown += f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
            hidden = [name for name, other in drawn.items() if _coincide(band, other)]
            drawn[shown] = band
            if hidden:  # seen between the dashes
                shown, dash = f"{shown} (same curve as {hidden[0]})", "dashed"
            marks.line(ax, band, colour, shown, lw=1.8, ls=dash)
            if len(lost):
                ax.plot(lost, [0.97] * len(lost), "x", color=colour, mew=2, clip_on=0,
                        transform=ax.get_xaxis_transform())  # fmt: skip
        everything = [band.middle for band in drawn.values()]
        marks.log_scale(ax, np.concatenate(everything))
        # A run that explodes must not press the others flat.
        marks.leave_out_explosions(ax, everything)
        name = for_picture(column)
        better = " (lower is better)" if "loss" in name else ""
        ax.set(title=f"{name} of each run{better}", xlabel="step", ylabel=name)
        marks.legend_above(ax)
    return figure


def _coincide(one: Envelope, other: Envelope) -> bool:
    """Whether one line would hide the other."""
    if not np.array_equal(one.steps, other.steps):
        return False
    return np.allclose(one.middle, other.middle, rtol=1e-3, atol=0.0, equal_nan=True)


def sweep(found: Sweep, *, theme: str = "light", ax: Any = None) -> Any:
    """Draws the score of each threshold of a sweep.

    Args:
        found: the result of :func:`optax_clipx.find_threshold`.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:
        >>> import optax_clipx as clipx
        >>> train_fn = lambda threshold: (threshold - 1.0) ** 2
        >>> found = clipx.find_threshold(train_fn, 0.1, 10.0, num=5, progress=False)
        >>> figure = clipx.plotting.sweep(found)
        >>> figure.axes[0].get_xlabel()
        'threshold'

    References:
        The choice of a threshold: Pascanu et al., 2013, arXiv 1211.5063.
    """
    with canvas(theme, ax) as (figure, ax, colours):
        for index, rate in enumerate(found.learning_rates):
            colour = colours.lines[index % len(colours.lines)]
            scores = found.scores[:, index]
            shown = np.where(np.isfinite(scores), scores, np.nan)
            band = Envelope(
                np.array(found.limits),
                np.array([marks.of_finite(np.min, s) for s in shown]),
                np.array([marks.middle(s) for s in shown]),
                np.array([marks.of_finite(np.max, s) for s in shown]),
            )
            name = "score" if rate is None else f"learning rate {rate:g}"
            dash = DASHES[index // len(colours.lines) % len(DASHES)]
            marks.line(ax, band, colour, name, lw=1.8, ls=dash, marker="o")
            failed = band.steps[~np.isfinite(band.middle)]
            if len(failed):
                named = "failed" in ax.get_legend_handles_labels()[1]
                label = None if named else "failed"
                ax.plot(failed, [0.03] * len(failed), "x", color=colours.clipped, mew=2,
                        transform=ax.get_xaxis_transform(), label=label)  # fmt: skip
        style = {"color": colours.limit, "lw": 1.3, "ls": (0, (5, 2))}
        ax.axvline(found.best, label=f"best: {found.best:.3g}", **style)
        ax.set_xscale("log")
        ticks = found.limits[:: 1 + len(found.limits) // 9]
        ax.set_xticks(ticks, [f"{limit:.3g}" for limit in ticks])
        ax.minorticks_off()
        if not found.higher_is_better:
            marks.log_scale(ax, found.scores)
        title = f"Score with each threshold ({_better(found)})"
        ax.set(title=title, xlabel="threshold", ylabel="score")
        marks.legend_above(ax)
    return figure


def sweep_map(found: Sweep, *, theme: str = "light", ax: Any = None) -> Any:
    """Draws the score of each threshold and learning rate of a sweep, as a map.

    Args:
        found: the result of :func:`optax_clipx.find_threshold` with
            ``learning_rates``.
        theme: as for :func:`norms`.
        ax: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``. A cell is crossed out if training failed.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:
        >>> import optax_clipx as clipx
        >>> found = clipx.find_threshold(
        ...     lambda threshold, learning_rate: threshold + learning_rate,
        ...     0.1, 10.0, num=3, learning_rates=[0.1, 1.0], progress=False,
        ... )
        >>> figure = clipx.plotting.sweep_map(found)
        >>> figure.axes[0].get_ylabel()
        'learning rate'

    References:
        Larger learning rates with clipping: Pascanu et al., 2013, arXiv 1211.5063.
    """
    middle = np.array([[marks.middle(s) for s in row] for row in found.scores]).T
    with canvas(theme, ax, (8.0, 1.6 + 0.45 * len(middle))) as (figure, ax, colours):
        best_is_dark = not found.higher_is_better
        positive = middle[np.isfinite(middle)]
        logarithmic = bool((positive > 0).all()) and best_is_dark
        image = ax.imshow(
            middle,
            norm=marks.log_norm(positive) if logarithmic else None,
            cmap="cividis_r" if best_is_dark else "cividis",
            aspect="auto",
            origin="lower",
        )
        for row, line in enumerate(middle):
            for column, value in enumerate(line):
                marks.cell(ax, column, row, value, image, colours)
        at = found.limits.index(found.best)
        rate = found.learning_rates.index(found.best_learning_rate)
        frame = {"color": colours.clipped, "lw": 3}
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) / 2
        corners += np.array([at, rate])
        ax.plot(*corners.T, clip_on=False, zorder=5, **frame)
        names = [f"{x:.3g}" for x in found.limits]
        rates = ["" if x is None else f"{x:g}" for x in found.learning_rates]
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(rates)), rates)
        ax.grid(False)
        title = f"Score of each threshold and learning rate ({_better(found)})"
        ax.set(title=title, xlabel="threshold", ylabel="learning rate")
        figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05, label="score")
    return figure


def _better(found: Sweep) -> str:
    return "higher is better" if found.higher_is_better else "lower is better"


def overview(
    run: Any,
    *,
    norm: str | None = None,
    limit: float | int | None = None,
    theme: str = "light",
) -> Any:
    """Draws a run in one picture: the norms, the clip rate and a histogram of norms.

    The picture also has these panels, if the run has the columns for them:

    - the loss and the learning rate
    - the norm of each layer
    - the norm of the update, the share of the squared norm that comes from the largest
      leaf, the fraction of starved leaves, and the fraction of spikes

    :func:`optax_clipx.track_norms` records the columns for the last two. The norm
    of the update may also be in a column ``update_norm``.

    Args:
        run: as for :func:`norms`.
        norm: as for :func:`norms`.
        limit: as for :func:`norms`.
        theme: as for :func:`norms`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ValueError: if there are no norms in the run.
        ImportError: if matplotlib is not installed.

    Example:
        >>> from optax_clipx import plotting
        >>> figure = plotting.overview({"clip/norm": [1.0, 3.0, 2.0]}, limit=2.5)
        >>> len(figure.axes)
        3

    References:
        Pascanu et al., 2013, arXiv 1211.5063.
    """
    columns = naming.with_update_norm(columns_of(run))
    seen = norms_of(columns, norm, limit)
    limited = seen.clipped is not None or seen.skipped is not None
    layers = [name for name in columns if name.startswith("track_norms/")]
    rows = [["norms", "norms"], ["rate" if limited else "histogram", "histogram"]]
    tracked = [x for x in _TRACKED if x in columns and present(columns[x]).any()]
    heights = [6.0] + ([min(6.0, 1.2 + 0.27 * len(layers))] if layers else [])
    heights += [3.0] if tracked else []
    beside = _loss_and_rate(columns)
    heights += [3.0] if beside else []
    with canvas(theme, size=(8.4, sum(heights))) as (figure, first, _):
        first.remove()
        # Apart, so that long names of layers do not push the others aside.
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        axes = parts[0, 0].subplot_mosaic(rows, height_ratios=[1.2, 1])
        options: dict[str, Any] = {"norm": norm, "limit": limit, "theme": theme}
        norms(columns, ax=axes["norms"], **options)
        histogram(columns, ax=axes["histogram"], **options)
        if limited:
            clip_rate(columns, ax=axes["rate"], **options)
            marks.align_titles(axes["rate"], axes["histogram"])
        if layers:
            heatmap(columns, theme=theme, ax=parts[1, 0].subplots())
        if tracked:
            _draw_tracked(columns, tracked, parts[-1 - bool(beside), 0], theme)
        if beside:
            _draw_beside(columns, beside, parts[-1, 0], theme)
    return figure


def _loss_and_rate(columns: Any) -> dict[str, str]:
    """The columns with the loss and the learning rate, if they are recorded."""
    found = {}
    for title, what in (("Loss", "loss"), ("Learning rate", "schedule")):
        try:
            name = naming.pick(columns, what)
        except ReadError:
            continue
        if not name.endswith("value") and present(columns[name]).any():
            found[title] = name
    return found


def _draw_beside(columns: Any, names: Mapping[str, str], part: Any, theme: str) -> None:
    """The loss and the learning rate, one beside the other."""
    axes = part.subplots(1, len(names), squeeze=False)[0]
    for ax, (title, name) in zip(axes, names.items(), strict=True):
        with canvas(theme, ax) as (_, ax, colours):
            there = present(columns[name])
            values = np.asarray(columns[name], np.float64)[there]
            points = envelope(columns[STEP][there], values)
            marks.line(ax, points, colours.lines[0], title)
            marks.log_scale(ax, values)
            ax.set(xlabel="step", title=title)
            if title == "Loss":
                ax.set_ylabel("lower is better")


_TRACKED = {
    naming.UPDATE: "norm",
    "track/dominant_share": "largest leaf's share",
    "track/starved": "starved leaves",
    "track/spike_score": "spike score",
}


def _draw_tracked(columns: Any, names: list[str], part: Any, theme: str) -> None:
    """The norm of the update, and beside it what is a share."""
    shares = [name for name in names if name != naming.UPDATE]
    kinds = [[name for name in names if name not in shares], shares]
    kinds = [kind for kind in kinds if kind]
    axes = part.subplots(1, len(kinds), squeeze=False)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        with canvas(theme, ax) as (_, ax, colours):
            for i, name in enumerate(kind):
                there = present(columns[name])
                values = np.asarray(columns[name], np.float64)[there]
                points = envelope(columns[STEP][there], values)
                marks.line(ax, points, colours.lines[i], _TRACKED[name])
            ax.set(xlabel="step", title="Shares" if kind is shares else "Update norm")
            if kind is shares:
                ax.set_ylim(-0.03, 1.03)
                ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
                marks.legend_above(ax)
            else:
                marks.log_scale(ax, values)
    marks.align_titles(axes[0], axes[-1])
