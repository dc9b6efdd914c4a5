"""Findings as they come: the last steps of a run that grows are judged now and then."""

import warnings
from collections.abc import Callable

import numpy as np

from .findings import SEVERITIES, Finding
from .jsonl import ReadError
from .judging import judge
from .merging import NO_RESTARTS, Restarts
from .signals import Names, Signals
from .table import STEP, Columns, Table, present

# Rules need the steps around a fault, and some need a hundred after it.
_KEPT = 2000
_EVERY = 100
# The place of one fault may move a little when more steps are known.
_SAME = 20
_AT_STEPS = frozenset(
    ("spikes", "level-shift", "update-before-loss", "nonfinite", "restarts")
)


class Alarm:
    """Tells which findings are new; a fault that goes on is told once."""

    def __init__(self, names: Names | None = None) -> None:
        self.names = names or Names()
        self.found: list[Finding] = []
        self._told: dict[str, Finding] = {}
        self._rows, self._back = 0, NO_RESTARTS

    def follow(self, columns: Columns, back: Restarts = NO_RESTARTS) -> None:
        """Looks at columns that may have grown: at all, then near what is new."""
        rows = len(columns[STEP])
        if rows != self._rows or back != self._back:
            start = max(0, min(self._rows, rows) - _KEPT)
            self._rows, self._back = rows, back
            self.look({name: x[start:] for name, x in columns.items()}, back)

    def look(self, columns: Columns, back: Restarts = NO_RESTARTS) -> list[Finding]:
        """The warnings and errors in these columns that were not told before."""
        seen = Signals(columns, self.names, back)
        new = [x for x in judge(seen).findings if x.severity != "info"]
        new = [finding for finding in new if self._is_new(finding)]
        self._told |= {finding.code: finding for finding in new}
        self.found += new
        return new

    def told(self, code: str) -> bool:
        """Whether such a finding was told."""
        return code in self._told

    def _is_new(self, finding: Finding) -> bool:
        before = self._told.get(finding.code)
        if before is None:
            return True
        worse = SEVERITIES.index(finding.severity) < SEVERITIES.index(before.severity)
        further = finding.steps[-1] > before.steps[-1] + _SAME
        return worse or (further and finding.code in _AT_STEPS)


class Listener:
    """Calls a function for each new finding in a table that grows."""

    def __init__(self, call: Callable[[Finding], object]) -> None:
        self._call = call
        self._alarm: Alarm | None = Alarm()
        self._judged = self._checked = 0

    def hear(self, table: Table, at_end: bool = False) -> None:
        """Looks at the table, if it has grown enough, breaks, or will grow no more."""
        count = len(table)
        if self._alarm is None or count == (self._judged if at_end else self._checked):
            return
        broke = not self._alarm.told("nonfinite") and not _finite(
            table.last(max(1, count - self._checked))
        )
        self._checked = count
        # Fewer rows than before: the run went back to a checkpoint.
        enough = not self._judged <= count < self._judged + _EVERY
        if broke or enough or at_end:
            self._judged = count
            for finding in self._new(self._alarm, table):
                self._call(finding)

    def _new(self, alarm: Alarm, table: Table) -> list[Finding]:
        try:
            return alarm.look(table.last(_KEPT))
        except ReadError as error:
            self._alarm = None  # to say it once is enough
            warnings.warn(f"on_finding is not called. {error}", stacklevel=5)
            return []


def _finite(columns: Columns) -> bool:
    values = [x[present(x)] for name, x in columns.items() if name != STEP]
    return all(np.isfinite(x).all() for x in values)
