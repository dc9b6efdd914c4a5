"""A table of what the designs reached."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from clipbench.methods import FIXED, RELATIVE_LIMITS
from clipbench.report import best_fixed, chosen_elsewhere, judged, losses, ratio

from autodesign.deciding import mean

Record = dict[str, Any]
Row = dict[str, Record]
LUCK = "best fixed threshold, chosen by other seeds"
HEAD = ["within 3%", "within 10%", "median", "90%", "diverged", "worse than none"]


def by_cell(records: list[Record]) -> dict[tuple[str, str], Row]:
    """The results of each task and optimizer, in the form of clipbench's."""
    found: dict[tuple[str, str], Row] = defaultdict(dict)
    for r in records:
        if "design" in r:
            final = np.array(r["final"], float)[:, None, :]  # one number for a method
            found[r["task"], r["optimizer"]][r["design"]] = {**r, "final": final}
    for row in found.values():
        own = [row.pop(f"fixed {c:g}")["final"] for c in RELATIVE_LIMITS]
        row[FIXED] = {"final": np.concatenate(own, axis=1)}
    return dict(found)


def fixed_ratio(row: Row, number: int) -> float:
    """The loss at one of the fixed thresholds over that at the best one."""
    return float(losses(row[FIXED])[:, number].min() / best_fixed(row))


def write_report(records: list[Record], path: Path, names: Iterable[str]) -> None:
    """Writes and prints the table of these designs, and of the parts by optimizer."""
    found = by_cell(records)
    rows = list(found.values())
    lines = [line("design", *HEAD, "mean", "sgd", "momentum", "adam", "lion")]
    lines.append("|---|" + "---:|" * (len(HEAD) + 5))
    entries = {LUCK: {c: chosen_elsewhere(row) for c, row in found.items()}}
    for number, c in enumerate(RELATIVE_LIMITS):
        entries[f"fixed, {c:g} of the first gradients"] = {
            cell: fixed_ratio(row, number) for cell, row in found.items()
        }
    for name in names:
        if all(name in row for row in rows):
            entries[name] = {c: ratio(row, name) for c, row in found.items()}
    for name, ratios in entries.items():
        cells = judged(list(ratios.values()), rows)
        middle = f"{mean(np.array(list(ratios.values()))):.3f}"
        lines.append(line(name, *cells, middle, *shares(ratios)))
    hours = sum(r.get("seconds", 0) for r in records) / 3600
    text = "\n".join([*lines, "", f"{len(rows)} cells, {hours:.2g} hours."]) + "\n"
    print(text)
    path.write_text(text)


def shares(ratios: dict[tuple[str, str], float]) -> Iterable[str]:
    """For each optimizer the share of its cells within 3%."""
    for optimizer in ("sgd", "momentum", "adam", "lion"):
        own = [r for (_, o), r in ratios.items() if o == optimizer]
        yield f"{np.mean(np.array(own) <= 1.03):.0%}" if own else "-"


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
