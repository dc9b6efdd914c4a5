"""Columns of numbers that grow, one row a recorded step.

A cell holds a finite number, a NaN or infinity that was recorded, or nothing. Nothing
is written as one NaN with bits of its own, as R does for its NA. It takes no memory
beside the 8 bytes of the cell, and it stays with the values when they are cut, sorted
or handed on: no mask can get out of step with its column. Its bits lie high enough to
outlive a conversion to float32 and back.
"""

import bisect
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STEP = "step"
Columns = dict[str, np.ndarray]

_BITS = np.uint64(0x7FF8_07A2_0000_0000)
MISSING = float(_BITS.view(np.float64))


def present(values: Any) -> np.ndarray:
    """Which entries were recorded; a NaN that was recorded counts."""
    values = np.asarray(values)
    if values.dtype.kind in "iub":
        return np.ones(values.shape, bool)
    return values.astype(np.float64, copy=False).view(np.uint64) != _BITS


class Table:
    """Columns by name, all of one length; what a row lacks is missing.

    A column is 8 bytes a row, so a million steps of a clipper's metrics are 80 MB.
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {STEP: array("d")}

    def __len__(self) -> int:
        return len(self._columns[STEP])

    @property
    def last_step(self) -> float | int:
        """The step of the last row, or minus infinity."""
        return self._columns[STEP][-1] if len(self) else -np.inf

    @property
    def rises(self) -> bool:
        """Whether each row has a larger step than the one before."""
        return bool((np.diff(np.array(self._columns[STEP])) > 0).all())

    def names(self) -> list[str]:
        """The names of the columns."""
        return list(self._columns)

    def extend(self, columns: Mapping[str, Any]) -> None:
        """Adds rows: for each name, the step among them, an array of one length."""
        # Converted first: a column that is refused must not leave the others longer.
        rows = {n: np.asarray(x, np.float64).tobytes() for n, x in columns.items()}
        before, count = len(self), len(columns[STEP])
        for name, values in rows.items():
            if name not in self._columns:
                self._columns[name] = array("d", [MISSING]) * before
            self._columns[name].frombytes(values)
        for name, column in self._columns.items():
            if name not in rows:
                column.extend(array("d", [MISSING]) * count)

    def adds_to_last(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has the last row's step, and only what that row lacks."""
        return bool(columns[STEP][0] == self.last_step) and not any(
            present([self._columns[name][-1]])[0]
            for name in columns
            if name in self._columns and name != STEP
        )

    def add_to_last(self, columns: Mapping[str, Any]) -> None:
        """Fills cells of the last row, and adds the rows that follow."""
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = array("d", [MISSING]) * len(self)
            self._columns[name][-1] = float(values[0])
        self.extend({name: values[1:] for name, values in columns.items()})

    def forget_from(self, step: float | int) -> int:
        """Drops the rows from a step on, and says how many there were."""
        if step > self.last_step:
            return 0
        keep = int(np.searchsorted(np.array(self._columns[STEP]), step))
        dropped = len(self) - keep
        for column in self._columns.values():
            del column[keep:]
        return dropped

    def newest_before(self, step: int, names: Sequence[str], count: int) -> Columns:
        """The last rows before a step, at most ``count``, without the others."""
        steps = self._columns[STEP]
        end = bisect.bisect_left(steps, step)
        part = slice(max(0, end - count), end)
        missing = array("d", [MISSING]) * (part.stop - part.start)
        return {
            name: np.array(self._columns[name][part] if name in self else missing)
            for name in (STEP, *names)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def last(self, rows: int) -> Columns:
        """A copy of the last rows; steps are integers."""
        start = max(0, len(self) - rows)
        found = {name: np.array(x[start:]) for name, x in self._columns.items()}
        found[STEP] = found[STEP].astype(np.int64)
        return found

    def arrays(self) -> Columns:
        """A copy of each column; steps are integers."""
        found = {name: np.array(values) for name, values in self._columns.items()}
        found[STEP] = found[STEP].astype(np.int64)
        return found
