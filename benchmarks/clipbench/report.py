"""Tables and pictures of what the methods reached."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from clipbench.methods import FIXED, METHODS, RELATIVE_LIMITS
from optax_clipx.runs.drawing import rc, theme_of

Record = dict[str, Any]
Cell = tuple[str, str, str]  # half, task, optimizer
NEAR = 1.03  # what counts as equal
TUNED = 1  # the place of the tuned learning rate among the three
HALVES = ("design", "held out")
NUMBERS = ("the default", "second number", "third number")
BAR = "loss / loss of the best fixed threshold (lower is better)"


def write_report(records: list[Record], path: Path, pictures: Path | None) -> None:
    """Writes and prints the tables; draws the pictures if there is a folder."""
    found = by_cell(records)
    hours = sum(r["seconds"] for r in records) / 3600
    took = f"{len(records)} records, {hours:.2g} hours of one core."
    text = "\n".join([*summary(found), *whole_table(found), "", took, ""])
    print(text)
    path.write_text(text)
    if pictures:
        draw(found, pictures)


def by_cell(records: list[Record]) -> dict[Cell, dict[str, Record]]:
    """The results of each cell that has what others are compared with."""
    found: dict[Cell, dict[str, Record]] = defaultdict(dict)
    for r in records:
        if r["kind"] == "method":
            found[r["half"], r["task"], r["optimizer"]][r["method"]] = r
    return {c: row for c, row in found.items() if {FIXED, "none"} <= set(row)}


def over_seeds(final: Any) -> np.ndarray:
    """The geometric mean over the last axis; infinite if one of them diverged."""
    logs = np.log(np.array(final, float))
    return np.nan_to_num(np.exp(np.mean(logs, axis=-1)), nan=math.inf)


def losses(record: Record) -> np.ndarray:
    """The final losses: rates by numbers."""
    return over_seeds(record["final"])


def best_fixed(row: dict[str, Record], tuned: bool = False) -> float:
    """The loss at the best fixed threshold, chosen in hindsight with its rate."""
    found = losses(row[FIXED])
    return float(found[TUNED].min() if tuned else found.min())


def ratio(
    row: dict[str, Record], method: str, number: int = 0, tuned: bool = False
) -> float:
    """The loss of a method over that of the best fixed threshold.

    Both at the best of three learning rates, or both at the tuned one.
    """
    found = losses(row[method])[:, number]
    return float((found[TUNED] if tuned else found.min()) / best_fixed(row, tuned))


def chosen_elsewhere(row: dict[str, Record]) -> float:
    """What a fixed threshold and rate reach that the other half of the seeds chose.

    Over the best in hindsight: by so much luck decides, for any method.
    """
    final = np.array(row[FIXED]["final"], float)
    halves = final[..., 0::2], final[..., 1::2]
    reached = []
    for here, there in (halves, halves[::-1]):
        chosen = np.unravel_index(over_seeds(there).argmin(), final.shape[:2])
        reached.append(over_seeds(here)[chosen])
    return float(np.sqrt(np.prod(reached)) / best_fixed(row))


def summary(found: dict[Cell, dict[str, Record]]) -> list[str]:
    """For each half of the tasks a table with a line for each method."""
    lines = []
    for half in HALVES:
        rows = [row for cell, row in found.items() if cell[0] == half]
        if not rows:
            continue
        head = [
            f"method ({half}, {len(rows)} cells)",
            "within 3%",
            "within 10%",
            "median",
            "90%",
            "diverged",
            "worse than none",
            "within 3%, one rate",
            "median, one rate",
            "spikes",
        ]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
        for method in METHODS:
            if method == FIXED:
                lines.append(line_of_luck(rows))
            else:
                lines.append(line(method, [row for row in rows if method in row]))
        lines.append("")
    return lines


def line(method: str, rows: list[dict[str, Record]]) -> str:
    """How a method did in these cells."""
    if not rows:
        return f"| {method} |" + " |" * 9
    one_rate = np.array([ratio(row, method, tuned=True) for row in rows])
    spikes = np.mean([row[method]["spikes"][TUNED][0] for row in rows])
    cells = [
        *judged([ratio(row, method) for row in rows], rows),
        f"{np.mean(one_rate <= NEAR):.0%}",
        times(float(np.median(one_rate))),
        f"{spikes:.2%}",
    ]
    return f"| {method} | " + " | ".join(cells) + " |"


def line_of_luck(rows: list[dict[str, Record]]) -> str:
    """How the best fixed threshold does on other seeds than those that chose it."""
    cells = judged([chosen_elsewhere(row) for row in rows], rows)
    return (
        "| best fixed threshold, chosen by other seeds | "
        + " | ".join(cells)
        + " | | | |"
    )


def judged(found: list[float], rows: list[dict[str, Record]]) -> list[str]:
    """What the ratios of these cells say, at the best of three rates."""
    ratios = np.array(found)
    worse = [r > NEAR * ratio(row, "none") for r, row in zip(found, rows, strict=True)]
    return [
        f"{np.mean(ratios <= NEAR):.0%}",
        f"{np.mean(ratios <= 1.1):.0%}",
        times(float(np.median(ratios))),
        times(float(np.quantile(ratios, 0.9, method="higher"))),
        str(int(np.isinf(ratios).sum())),
        str(int(np.sum(worse))),
    ]


def times(value: float) -> str:
    """A ratio, as short as it can be said."""
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def whole_table(found: dict[Cell, dict[str, Record]]) -> list[str]:
    """Every cell: the best fixed threshold, and all others over its loss."""
    others = [m for m in METHODS if m != FIXED]
    head = ["task", "optimizer", "best threshold / first norms", "its loss", *others]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (half, task, optimizer), row in found.items():
        best = RELATIVE_LIMITS[int(losses(row[FIXED]).min(axis=0).argmin())]
        cells = [times(ratio(row, m)) if m in row else "" for m in others]
        mark = "" if half == "design" else " (held out)"
        first = [f"{task}{mark}", optimizer, f"{best:g}", f"{best_fixed(row):.4g}"]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return lines


def draw(found: dict[Cell, dict[str, Record]], folder: Path) -> None:
    """The whole table as a picture, and what each number changes; light and dark."""
    pictures = {"clipbench": draw_table, "clipbench_sensitivity": draw_sensitivity}
    save_pictures(pictures, found, folder)


def save_pictures(pictures: dict[str, Any], found: Any, folder: Path) -> None:
    """Every picture on a light and a dark page, from its name and what draws it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for theme, end in (("light", ""), ("dark", "_dark")):
        for name, draw_one in pictures.items():
            with plt.rc_context(rc(theme)):
                figure = draw_one(found, theme_of(theme), plt)
                figure.savefig(folder / f"{name}{end}.png", dpi=150)
                plt.close(figure)


def draw_table(found: dict[Cell, dict[str, Record]], colours: Any, plt: Any) -> Any:
    """One cell for each task, optimizer and method; diverged cells are hatched."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    there = {method for row in found.values() for method in row} - {FIXED}
    others = [m for m in METHODS if m in there]
    cells = sorted(found, key=lambda c: (HALVES.index(c[0]), c))
    rows = [
        [ratio(found[c], m) if m in found[c] else np.nan for m in others] for c in cells
    ]
    values = np.array(rows)
    size = (9, 0.26 * len(cells) + 2.4)
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    finite = np.where(np.isfinite(values), values, np.nan)
    scale = {"norm": LogNorm(0.8, 3), "cmap": "cividis_r", "aspect": "auto"}
    image = ax.imshow(np.clip(finite, 0.8, 3), **scale)
    ax.set_xticks(range(len(others)), others, rotation=45, ha="right")
    ax.set_yticks(range(len(cells)), [f"{t}, {o}" for _, t, o in cells], fontsize=8.5)
    ax.grid(False)
    hatched = {"facecolor": colours.page, "edgecolor": colours.text, "hatch": "////"}
    for (i, j), value in np.ndenumerate(values):
        if math.isinf(value):
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, lw=0, **hatched))
        elif not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(min(value, 3)))
            bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
            style = {"ha": "center", "va": "center", "fontsize": 7.5}
            ink = "black" if bright else "white"
            ax.text(j, i, f"{value:.3g}", color=ink, **style)
    edge = sum(c[0] == HALVES[0] for c in cells)
    ax.axhline(edge - 0.5, color=colours.text, lw=2)
    ax.set_title("Final loss divided by that of the best fixed threshold", pad=10)
    bar = figure.colorbar(image, ax=ax, extend="both", shrink=0.5, label=BAR)
    bar.set_ticks([0.8, 1, 1.5, 2, 3], labels=["0.8", "1", "1.5", "2", "3"])
    bar.minorticks_off()
    text = "Below the line: held-out tasks"
    figure.supxlabel(text, fontsize=10, ha="left", x=0.02, color=colours.text)
    patch = Patch(label="diverged", **hatched)
    figure.legend(handles=[patch], loc="outside lower right")
    return figure


def draw_sensitivity(
    found: dict[Cell, dict[str, Record]], colours: Any, plt: Any
) -> Any:
    """How much worse a method is at another number than its default."""
    tried = {method for row in found.values() for method in row} - {FIXED}
    asked = [m for m in METHODS if METHODS[m].asks_for and m in tried]
    figure, ax = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    for place, method in enumerate(asked):
        rows = [row for row in found.values() if method in row]
        for number in range(3):
            there = [row for row in rows if number < losses(row[method]).shape[1]]
            spread = np.array([ratio(row, method, number) for row in there])
            spread = np.clip(spread, 0.5, 10)
            at = np.full(len(spread), place + (number - 1) * 0.24)
            name = NUMBERS[number] if place == 0 else None
            style = {"s": 14, "alpha": 0.7, "marker": "os^"[number]}
            ax.scatter(at, spread, color=colours.lines[number], label=name, **style)
            ends = at[0] - 0.1, at[0] + 0.1
            ax.hlines(np.median(spread), *ends, color=colours.text, lw=2, zorder=3)
    ax.set_yscale("log")
    labels = []
    for method in asked:
        name = re.sub(r"(?<=_)(?=clip|update)|(?<=, )", "\n", method)
        numbers = "\n".join(f"{n:g}" for n in METHODS[method].numbers)
        labels.append(f"{name}\n{METHODS[method].asks_for}\n{numbers}")
    ax.set_xticks(range(len(asked)), labels, fontsize=9)
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10 or diverged"])
    ax.minorticks_off()
    ax.set_ylabel(BAR.replace(" (", "\n("))
    ax.set_title("Three values of each method's number (dashes: medians)", pad=30)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "borderaxespad": 0.2}
    ax.legend(ncols=3, **place)
    return figure
