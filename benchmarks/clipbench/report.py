"""Tables and pictures of what the methods reached."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from clipbench.methods import FIXED, METHODS, RELATIVE_LIMITS

Record = dict[str, Any]
Cell = tuple[str, str, str]  # half, task, optimizer
NEAR = 1.03  # what counts as equal
TUNED = 1  # the place of the tuned learning rate among the three
HALVES = ("design", "held out")
NUMBERS = ("the default", "second number", "third number")


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
    """The loss at the best fixed limit, chosen in hindsight with its rate."""
    found = losses(row[FIXED])
    return float(found[TUNED].min() if tuned else found.min())


def ratio(
    row: dict[str, Record], method: str, number: int = 0, tuned: bool = False
) -> float:
    """The loss of a method over that of the best fixed limit.

    Both at the best of three learning rates, or both at the tuned one.
    """
    found = losses(row[method])[:, number]
    return float((found[TUNED] if tuned else found.min()) / best_fixed(row, tuned))


def chosen_elsewhere(row: dict[str, Record]) -> float:
    """What a fixed limit and rate reach that were chosen by the other half of seeds.

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
    """How the best fixed limit does on other seeds than those that chose it."""
    cells = judged([chosen_elsewhere(row) for row in rows], rows)
    return (
        "| best fixed limit, chosen by other seeds | " + " | ".join(cells) + " | | | |"
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
    """Every cell: the best fixed limit, and all others over its loss."""
    others = [m for m in METHODS if m != FIXED]
    head = ["task", "optimizer", "best limit / first norms", "its loss", *others]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (half, task, optimizer), row in found.items():
        best = RELATIVE_LIMITS[int(losses(row[FIXED]).min(axis=0).argmin())]
        cells = [times(ratio(row, m)) if m in row else "" for m in others]
        mark = "" if half == "design" else " (held out)"
        first = [f"{task}{mark}", optimizer, f"{best:g}", f"{best_fixed(row):.4g}"]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return lines


def draw(found: dict[Cell, dict[str, Record]], folder: Path) -> None:
    """The whole table as a picture, and what each number changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    there = {method for row in found.values() for method in row} - {FIXED}
    others = [m for m in METHODS if m in there]
    cells = sorted(found, key=lambda c: (HALVES.index(c[0]), c))
    values = np.array(
        [
            [ratio(found[c], m) if m in found[c] else np.nan for m in others]
            for c in cells
        ]
    )
    figure, ax = plt.subplots(figsize=(9, 0.24 * len(cells) + 2), layout="constrained")
    image = ax.imshow(
        np.minimum(values, 3), norm=LogNorm(0.8, 3), cmap="RdYlGn_r", aspect="auto"
    )
    ax.set_xticks(range(len(others)), others, rotation=45, ha="right")
    ax.set_yticks(range(len(cells)), [f"{t}, {o}" for _, t, o in cells], fontsize=8)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            shown = f"{value:.2f}" if math.isfinite(value) else "div."
            ax.text(j, i, shown, ha="center", va="center", fontsize=7)
    edge = sum(c[0] == HALVES[0] for c in cells)
    ax.axhline(edge - 0.5, color="black", lw=2)
    ax.set_title(
        "Final loss over that of the best fixed limit; below the line: held out"
    )
    bar = figure.colorbar(image, ax=ax, extend="max", shrink=0.5)
    bar.set_ticks([0.8, 1, 1.5, 2, 3], labels=["0.8", "1", "1.5", "2", "3"])
    bar.minorticks_off()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "clipbench.png", dpi=110)
    plt.close(figure)
    sensitivity(found, folder, plt)


def sensitivity(found: dict[Cell, dict[str, Record]], folder: Path, plt: Any) -> None:
    """How much worse a method is at another number than its default."""
    tried = {method for row in found.values() for method in row} - {FIXED}
    asked = [m for m in METHODS if METHODS[m].asks_for and m in tried]
    if not asked:
        return
    figure, ax = plt.subplots(figsize=(11, 4.4), layout="constrained")
    for place, method in enumerate(asked):
        rows = [row for row in found.values() if method in row]
        for number in range(3):
            there = [row for row in rows if number < losses(row[method]).shape[1]]
            spread = np.array([ratio(row, method, number) for row in there])
            spread = np.clip(spread, 0.5, 10)
            at = np.full(len(spread), place + (number - 1) * 0.22)
            name = NUMBERS[number] if place == 0 else None
            ax.scatter(at, spread, s=9, alpha=0.6, color=f"C{number}", label=name)
            ends = at[0] - 0.09, at[0] + 0.09
            ax.hlines(np.median(spread), *ends, color="black", zorder=3)
    ax.set_yscale("log")
    labels = [
        f"{m}\n{METHODS[m].asks_for}\n"
        + ", ".join(f"{n:g}" for n in METHODS[m].numbers)
        for m in asked
    ]
    ax.set_xticks(range(len(asked)), labels, fontsize=7)
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10 or diverged"])
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    ax.set_ylabel("loss over the best fixed limit's")
    ax.set_title("Each method at three values of its number (medians in black)")
    figure.savefig(folder / "clipbench_sensitivity.png", dpi=110)
    plt.close(figure)
