"""Columns of numbers that grow, one row a recorded step."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

STEP = "step"
Columns = dict[str, np.ndarray]


class Table:
    """Columns by name, all of one length; what a row lacks is NaN.

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

    def extend(self, columns: Mapping[str, Any]) -> None:
        """Adds rows: for each name, the step among them, an array of one length."""
        before, count = len(self), len(columns[STEP])
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = array("d", [np.nan]) * before
            self._columns[name].frombytes(np.asarray(values, np.float64).tobytes())
        for name, column in self._columns.items():
            if name not in columns:
                column.extend(array("d", [np.nan]) * count)

    def forget_from(self, step: float | int) -> int:
        """Drops the rows from a step on, and says how many there were."""
        if step > self.last_step:
            return 0
        keep = int(np.searchsorted(np.array(self._columns[STEP]), step))
        dropped = len(self) - keep
        for column in self._columns.values():
            del column[keep:]
        return dropped

    def arrays(self) -> Columns:
        """A copy of each column; steps are integers."""
        found = {name: np.array(values) for name, values in self._columns.items()}
        found[STEP] = found[STEP].astype(np.int64)
        return found
