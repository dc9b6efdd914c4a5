"""Pictures of what the methods reached, on light and dark pages."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from clipbench.report import save_pictures

from lmbench.report import (
    FACTORS,
    HIGH,
    TUNED,
    Table,
    fixed,
    gap,
    interval,
)

MOST = 0.5  # nats above the best fixed threshold, where the colours end
SHOWN = ("none", "fixed 1", "auto_clip", "quantile_clip", "adagc", "stabilize_norm")
LOSS = "held-out loss in nats (lower is better)"


def draw(found: Table, folder: Path) -> None:
    """All pictures, for both themes."""
    pictures = {
        "lmbench": draw_table,
        "lmbench_rates": draw_rates,
        "lmbench_thresholds": draw_thresholds,
    }
    save_pictures(pictures, found, folder)


def draw_table(found: Table, colours: Any, plt: Any) -> Any:
    """Every method in every setting, at the tuned rate and at three times this rate."""
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Patch

    own = [(key, row) for rows in found.values() for key, row in rows.items()]
    labels = list(dict.fromkeys(key for key, row in own if row.default))
    columns = [(setting, place) for setting in found for place in (TUNED, HIGH)]
    values = np.full((len(labels), len(columns)), np.nan)
    for j, (setting, place) in enumerate(columns):
        for i, key in enumerate(labels):
            if key in found[setting]:
                values[i, j] = gap(found[setting], key, place)
    size = (2.6 + 0.95 * len(columns), 0.34 * len(labels) + 1.9)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    finite = np.where(np.isfinite(values), np.clip(values, 0, MOST), np.nan)
    scale = {"norm": PowerNorm(0.5, 0, MOST), "cmap": "cividis_r", "aspect": "auto"}
    image = ax.imshow(finite, **scale)
    ax.grid(False)
    names = [f"{s}\n{FACTORS[p]} x rate" for s, p in columns]
    names = [n.replace(", ", ",\n").replace("corrupt ", "corrupt\n") for n in names]
    ax.set_xticks(range(len(columns)), names, fontsize=8)
    ax.set_yticks(range(len(labels)), labels)
    hatched = {"facecolor": colours.page, "edgecolor": colours.text, "hatch": "////"}
    for (i, j), value in np.ndenumerate(values):
        if value == -math.inf:
            style = {"ha": "center", "va": "center", "fontsize": 8.5}
            ax.text(j, i, "trains", color=colours.text, **style)
        elif math.isinf(value):
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, lw=0, **hatched))
        elif not math.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(min(max(value, 0), MOST)))
            bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
            style = {"ha": "center", "va": "center", "fontsize": 8.5}
            ax.text(j, i, f"{value:.3f}", color="black" if bright else "white", **style)
    for edge in range(2, len(columns), 2):
        ax.axvline(edge - 0.5, color=colours.text, lw=1.5)
    ax.set_title(
        "Held-out loss above the best fixed threshold at the same rate", pad=10
    )
    figure.colorbar(
        image, ax=ax, extend="max", shrink=0.6, label="nats (lower is better)"
    )
    figure.legend(
        handles=[Patch(label="a seed diverged", **hatched)], loc="outside lower right"
    )
    return figure


def panels(found: Table, plt: Any) -> tuple[Any, list[Any]]:
    """One panel for each setting."""
    width = 2 if len(found) == 4 else min(len(found), 3)
    height = math.ceil(len(found) / width)
    figure, axes = plt.subplots(
        height,
        width,
        figsize=(3.6 * width + 0.4, 3.1 * height + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for ax, name in zip(axes.flat, found, strict=False):
        ax.set_title(name, fontsize=10)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    return figure, list(axes.flat[: len(found)])


def draw_rates(found: Table, colours: Any, plt: Any) -> Any:
    """The loss over the learning rate: where methods part."""
    figure, axes = panels(found, plt)
    own = [row for rows in found.values() for row in rows.values()]
    top = max(row.unigram for row in own)
    lowest = min([top, *(row.losses.min() for row in own)])
    for ax, rows in zip(axes, found.values(), strict=True):
        for number, key in enumerate(k for k in SHOWN if k in rows):
            row = rows[key]
            at = row.rate * np.array([1 / 3, 1, 3]) * 1.03 ** (number - 2.5)
            means = np.minimum(row.losses.mean(axis=1), top)
            colour = colours.text if key == "none" else colours.lines[number - 1]
            style = {"color": colour, "ms": 4}
            style["ls"] = "--" if number >= 3 else "-"  # some colours are much alike
            ax.plot(at, means, "o", label=key, **style)
            ends = [ends_of(seeds, top) for seeds in row.losses]
            ax.vlines(at, *zip(*ends, strict=True), color=style["color"], lw=1)
        ax.axhline(top, color=colours.text, lw=1, ls=":")
        ax.text(0.03, top, "diverged", va="bottom", transform=ax.get_yaxis_transform())
        ax.set(xscale="log", xlabel="learning rate")
        ax.set_ylim(lowest - 0.05, top + 0.12)
        rate = rows["none"].rate
        ticks = [rate / 3, rate, 3 * rate]
        ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel(LOSS.replace(" (", "\n("))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6
    )
    return figure


def ends_of(losses: np.ndarray, top: float) -> tuple[float, float]:
    """The interval of a mean; none where a run diverged."""
    return interval(losses) if np.isfinite(losses).all() else (top, top)


def draw_thresholds(found: Table, colours: Any, plt: Any) -> Any:
    """The loss over the fixed threshold; what no clipping reaches is a line across."""
    whole = {name: rows for name, rows in found.items() if len(fixed(rows)) > 1}
    found = whole or found  # one threshold is no curve
    figure, axes = panels(found, plt)
    for ax, rows in zip(axes, found.values(), strict=True):
        own, top = fixed(rows), rows["none"].unigram
        thresholds = [row.number for row in own]
        for place, name in ((TUNED, "tuned rate"), (HIGH, "three times the rate")):
            style = {"color": colours.lines[place == HIGH]}
            means = np.minimum([row.losses[place].mean() for row in own], top)
            ax.plot(thresholds, means, "o-", ms=4, label=name, **style)
            ends = [ends_of(row.losses[place], top) for row in own]
            ax.vlines(thresholds, *zip(*ends, strict=True), lw=1, **style)
            without = min(rows["none"].losses[place].mean(), top)
            ax.axhline(without, ls="--", lw=1.2, label=f"{name}, no clipping", **style)
        lines = ax.get_lines()
        finite = [y for one in lines for y in one.get_ydata() if y < top]
        if len(finite) < sum(len(one.get_ydata()) for one in lines):
            style = {"va": "bottom", "transform": ax.get_yaxis_transform()}
            ax.text(0.03, top, "diverged", **style)
        ax.set(xscale="log", xlabel="fixed threshold (max_norm)")
        ax.set_xticks(thresholds, [f"{x:g}" for x in thresholds])
        ax.minorticks_off()
        ax.margins(y=0.12)
    axes[0].set_ylabel(LOSS.replace(" (", "\n("))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    return figure
