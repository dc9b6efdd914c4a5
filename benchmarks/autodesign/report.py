"""A table of what the designs reached."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from clipbench.methods import FIXED, RELATIVE_LIMITS
from clipbench.report import (
    NEAR,
    best_fixed,
    chosen_elsewhere,
    judged,
    losses,
    ratio,
    times,
)

from autodesign.deciding import mean
from autodesign.designs import FIRST_CHOSEN, PACKAGE, third_list
from autodesign.later_tasks import LATER_MAKERS
from autodesign.tasks import MAKERS

Record = dict[str, Any]
Row = dict[str, Record]
Cell = tuple[str, ...]  # a task and an optimizer, and the run if there are several
Ratios = dict[Cell, float]
DRAWS = 20_000
LUCK = "best fixed threshold, chosen by other seeds"
HEAD = ["within 3%", "within 10%", "median", "90%", "diverged", "worse than none"]


def by_cell(records: list[Record]) -> dict[Cell, Row]:
    """The results of each task and optimizer, in the form of clipbench's."""
    found: dict[Cell, Row] = defaultdict(dict)
    for r in records:
        if "design" in r:
            final = np.array(r["final"], float)[:, None, :]  # one number for a method
            run = (str(r["run"]),) if "run" in r else ()
            cell = (r["task"], r["optimizer"], *run)
            found[cell][r["design"]] = {**r, "final": final}
    for row in found.values():
        own = [row.pop(f"fixed {c:g}")["final"] for c in RELATIVE_LIMITS]
        row[FIXED] = {"final": np.concatenate(own, axis=1)}
    return dict(found)


def fixed_ratio(row: Row, number: int) -> float:
    """The loss at one of the fixed thresholds over that at the best one."""
    return float(losses(row[FIXED])[:, number].min() / best_fixed(row))


def write_report(records: list[Record], path: Path, names: Collection[str]) -> None:
    """Writes and prints the table of these designs, and of the parts by optimizer."""
    text = "\n".join(summary(records, names)) + "\n"
    print(text)
    path.write_text(text)


def write_third(
    records: list[Record], first: list[Record], path: Path, names: Collection[str]
) -> None:
    """Writes and prints the tables of the third round: these tasks, and those before.

    The designs that ran on both are in the second table.
    """
    here = {r["task"] for r in records}
    before = [r for r in first if r["task"] not in here]
    lines = ["**The twelve further tasks**", "", *summary(records, names), ""]
    if PACKAGE in names:
        lines += ["**Cells behind the package's rule**", ""]
        lines += [*behind_package(records, names), ""]
    if before:
        lines += ["**All twenty-four tasks**", ""]
        lines += [*summary([*before, *records], names), ""]
    lines += ["**Each cell of the further tasks**", "", *each_cell(records, names)]
    text = "\n".join(lines) + "\n"
    print(text)
    path.write_text(text)


def write_fourth(records: list[Record], path: Path, names: Collection[str]) -> None:
    """Writes and prints the tables of the fourth round: all tasks, and both halves."""
    lines = halves(records, names)
    rows = by_cell(records).values()
    shown = [n for n in third_list() if all(n in row for row in rows)]
    lines += ["**Each cell**", "", *each_cell(records, shown)]
    text = "\n".join(lines) + "\n"
    print(text)
    path.write_text(text)


def halves(records: list[Record], names: Collection[str]) -> list[str]:
    """The tables of all tasks, of the first twelve and of the further ones."""
    further = [r for r in records if r["task"] in LATER_MAKERS]
    first = [r for r in records if r["task"] in MAKERS]
    lines = []
    for title, part in (
        ("All twenty-four tasks", records),
        ("The first twelve tasks", first),
        ("The twelve further tasks", further),
    ):
        if part:
            lines += [f"**{title}**", "", *summary(part, names, PACKAGE), ""]
    return lines


def each_cell(records: list[Record], names: Collection[str]) -> list[str]:
    """A table of the loss of each design over that of the best fixed threshold."""
    lines = [line("task", "optimizer", LUCK, *names)]
    lines.append("|---|---|" + "---:|" * (1 + len(names)))
    found = by_cell(records)
    functions = [functools.partial(ratio, method=name) for name in names]
    columns = [ratios_of(found, f) for f in (chosen_elsewhere, *functions)]
    lines += [line(*cell, *(times(c[cell]) for c in columns)) for cell in found]
    return lines


def behind_package(records: list[Record], names: Collection[str]) -> list[str]:
    """A table of the cells within 3% that the package's rule has more than each design.

    With the 95% interval of a bootstrap over the tasks.
    """
    found = by_cell(records)
    ratios = {n: ratios_of(found, functools.partial(ratio, method=n)) for n in names}
    lines = [line("design", "behind the package's rule"), "|---|---:|"]
    return lines + [line(n, behind(r, ratios[PACKAGE])) for n, r in ratios.items()]


def summary(
    records: list[Record], names: Collection[str], chosen: str = FIRST_CHOSEN
) -> list[str]:
    """The table of these designs, as lines, with what each is behind the chosen one."""
    found = by_cell(records)
    rows = list(found.values())
    more = ["mean", "of fixed", "behind", "sgd", "momentum", "adam", "lion"]
    lines = [line("design", *HEAD, *more)]
    lines.append("|---|" + "---:|" * (len(HEAD) + len(more)))
    entries = ratios_of_all(found, names)
    against = entries.get(chosen)
    for name, ratios in entries.items():
        with np.errstate(invalid="ignore"):
            cells = judged(list(ratios.values()), rows)
        middle = f"{mean(np.array(list(ratios.values()))):.3f}"
        more = [middle, relative(ratios, entries[LUCK])]
        more += [behind(ratios, against or ratios)]
        lines.append(line(name, *cells, *more, *shares(ratios)))
    listed = {*names, *(f"fixed {c:g}" for c in RELATIVE_LIMITS)}
    own = [r for r in records if r.get("design") in listed]
    hours = sum(r["seconds"] for r in own) / 3600
    return [*lines, "", f"{len(rows)} cells, {hours:.2g} hours."]


def ratios_of(found: dict[Cell, Row], function: Callable[[Row], float]) -> Ratios:
    """One of each cell; infinite as well if all fixed thresholds diverge there."""
    with np.errstate(invalid="ignore"):
        ratios = {cell: function(row) for cell, row in found.items()}
    return {cell: math.inf if math.isnan(x) else x for cell, x in ratios.items()}


def ratios_of_all(found: dict[Cell, Row], names: Collection[str]) -> dict[str, Ratios]:
    """By name: of the fixed thresholds, and of the designs that ran in every cell."""
    functions: dict[str, Callable[[Row], float]] = {LUCK: chosen_elsewhere}
    for number, c in enumerate(RELATIVE_LIMITS):
        name = f"fixed, {c:g} of the first gradients"
        functions[name] = functools.partial(fixed_ratio, number=number)
    for name in names:
        if all(name in row for row in found.values()):
            functions[name] = functools.partial(ratio, method=name)
    return {name: ratios_of(found, of) for name, of in functions.items()}


def near(ratios: Ratios) -> np.ndarray:
    """The cells of each task that are within 3%: these tasks, then draws of them."""
    tasks = sorted({cell[0] for cell in ratios})
    own = [
        sum(x <= NEAR for cell, x in ratios.items() if cell[0] == task)
        for task in tasks
    ]
    drawn = np.random.default_rng(0).integers(0, len(tasks), (DRAWS, len(tasks)))
    return np.array(own)[np.vstack([np.arange(len(tasks)), drawn])].sum(axis=1)


def relative(ratios: Ratios, fixed: Ratios) -> str:
    """The cells within 3%, over those of other ratios; 95% bootstrap over tasks."""
    found = near(ratios) / np.maximum(near(fixed), 1)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return f"{found[0]:.0%} ({low:.0%} to {high:.0%})"


def behind(ratios: Ratios, chosen: Ratios) -> str:
    """How many cells fewer than the chosen rule; 95% bootstrap over tasks."""
    found = near(chosen) - near(ratios)
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return f"{found[0]} ({low:.0f} to {high:.0f})"


def shares(ratios: Ratios) -> Iterable[str]:
    """For each optimizer the share of its cells within 3%."""
    for optimizer in ("sgd", "momentum", "adam", "lion"):
        own = [r for cell, r in ratios.items() if cell[1] == optimizer]
        yield f"{np.mean(np.array(own) <= 1.03):.0%}" if own else "-"


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
