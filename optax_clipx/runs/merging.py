"""One row a step: rows of one step become one row, and a restart replaces a stretch."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .jsonl import ReadError
from .table import MISSING, STEP, Columns, Table, present


class Restarts(NamedTuple):
    """Where steps go back.

    Attributes:
        steps: with which a stretch begins again.
        before: the step that was recorded before each.
        mixed: they go back as often as where several runs are mixed.
        dropped: the records that were run again are in a file of their own.
    """

    steps: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    mixed: bool = False
    dropped: bool = False


NO_RESTARTS = Restarts()


def restarts(table: Table) -> Restarts:
    """Where the steps of a table go back, before its rows are merged."""
    if table.rises:
        return Restarts()
    columns = table.arrays()
    columns, _ = _merged(columns, _starts(columns[STEP]))
    steps = columns[STEP]
    back = _goes_back(steps, _late(columns))
    at = np.flatnonzero(back)
    return Restarts(
        tuple(steps[at].tolist()), tuple(steps[at - 1].tolist()), _are_mixed(back)
    )


def one_row_a_step(path: Path, table: Table) -> Table:
    """The same records with steps that rise.

    Rows of one step that follow each other are merged; the later value that is present
    wins. Where steps go back and a stretch is run again, as after a restart, the later
    stretch takes the place of the earlier. A single row that goes back and only adds
    to its step, as an evaluation that was logged late, is merged into that step.
    """
    if table.rises:
        return table
    columns, records = table.arrays(), np.arange(len(table)) + 1
    starts = _starts(columns[STEP])
    columns, replaced = _merged(columns, starts)
    late = _late(columns)
    back = _goes_back(columns[STEP], late)
    _check_one_run(path, back, records[starts])
    kept = _outlives(columns[STEP], back)
    order = np.flatnonzero(kept)[np.argsort(columns[STEP][kept], kind="stable")]
    columns = {name: values[order] for name, values in columns.items()}
    columns, _ = _merged(columns, _starts(columns[STEP]))
    if back.any():
        warnings.warn(
            f"{path}: steps go back at record {records[starts][back][0]}, as after a"
            f" restart; {int((~kept).sum())} records of steps that were run again are"
            " left out.",
            stacklevel=5,
        )
    if replaced:
        names = ", ".join(map(repr, sorted(replaced)[:5]))
        warnings.warn(
            f"{path}: {max(replaced.values())} steps have several values in {names};"
            " the last value of each step is taken.",
            stacklevel=5,
        )
    merged = Table()
    merged.extend(columns)
    return merged


def _starts(steps: np.ndarray) -> np.ndarray:
    """Where rows of another step begin."""
    return np.flatnonzero(np.append(True, np.diff(steps) != 0))


def _merged(columns: Columns, starts: np.ndarray) -> tuple[Columns, dict[str, int]]:
    """One row for each group of rows, and in how many groups which column differs."""
    count = len(columns[STEP])
    if len(starts) == count:
        return columns, {}
    rows, found, replaced = np.arange(count), {}, {}
    for name, values in columns.items():
        known = present(values)
        last = np.maximum.reduceat(np.where(known, rows, -1), starts)
        first = np.minimum.reduceat(np.where(known, rows, count), starts)
        any_known = last >= 0
        found[name] = np.where(any_known, values[last], MISSING)
        ends = values[first[any_known]], values[last[any_known]]
        differ = int(np.sum(~_same(*ends)))
        if differ:
            replaced[name] = differ
    found[STEP] = columns[STEP][starts]
    return found, replaced


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _late(columns: Columns) -> np.ndarray:
    """Single rows that go back to a step that is there, and contradict nothing in it.

    Rows of two runs in one file go back as often, but to steps that are not there, or
    with other values for the same names.
    """
    steps = columns[STEP]
    late = np.zeros(len(steps), bool)
    alone = (steps[1:-1] < steps[:-2]) & (steps[2:] >= steps[:-2])
    back = np.flatnonzero(alone) + 1
    if not len(back):
        return late
    order = np.argsort(steps, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    before = order[place[back] - 1]
    agrees = (place[back] > 0) & (steps[before] == steps[back])
    for values in columns.values():
        a, b = values[before], values[back]
        agrees &= _same(a, b) | ~present(a) | ~present(b)
    late[back[agrees]] = True
    return late


def _goes_back(steps: np.ndarray, late: np.ndarray) -> np.ndarray:
    """Where a stretch begins whose steps were run before."""
    back = np.zeros(len(steps), bool)
    rows = np.flatnonzero(~late)
    back[rows[1:][np.diff(steps[rows]) < 0]] = True
    return back


def _are_mixed(back: np.ndarray) -> bool:
    """A restart is followed by a stretch; runs that are mixed alternate."""
    times = int(back.sum())
    stretches = np.diff(np.append(np.flatnonzero(back), len(back)))
    often = times > max(10, len(back) // 100)
    return bool(often or (times > 2 and np.median(stretches) <= 2))


def _check_one_run(path: Path, back: np.ndarray, records: np.ndarray) -> None:
    """Raises an error where the rows are those of several runs."""
    if _are_mixed(back):
        raise ReadError(
            f"{path}: expected steps that rise, but they go back {int(back.sum())}"
            f" times, first in record {records[back][0]}. Are several runs mixed in one"
            " file? Write each to a file of its own."
        )


def _outlives(steps: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Which rows no later stretch takes the place of."""
    first = steps[back].astype(np.float64)
    least = np.append(np.minimum.accumulate(first[::-1])[::-1], np.inf)
    return steps < least[np.cumsum(back)]
