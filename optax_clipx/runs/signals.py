"""What a diagnosis looks at: loss, norms, thresholds, whatever they are called.

A column may be recorded less often than others; each signal has the steps it has.
"""

import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import criteria, naming, readers
from .compression import is_compressed
from .drawing import Norms, norms_of
from .jsonl import ReadError
from .levels import piece_starts, pieces
from .merging import Restarts, one_row_a_step, restarts
from .table import MISSING, STEP, Columns, Table, present

_HUGE = 1e100
_OWN = {"update_norm": naming.UPDATE, "target": "clip/target"}


class Line(NamedTuple):
    """One number a step, of the steps that have it."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    def chosen(self, which: np.ndarray) -> "Line":
        """Some of the steps."""
        return Line(self.name, self.steps[which], self.values[which])

    def before(self, step: float | int) -> "Line":
        """The steps before one."""
        return self.chosen(self.steps < step)

    def finite(self) -> "Line":
        """The steps whose number is finite, and so are its square and sums."""
        line = self.chosen(np.isfinite(self.values))
        return line._replace(values=np.clip(line.values, -_HUGE, _HUGE))

    def logs(self) -> "Line":
        """The logarithms of positive numbers; a zero says nothing of the level."""
        positive = self.chosen(np.isfinite(self.values) & (self.values > 0))
        return positive._replace(values=np.log(positive.values))

    def best(self) -> tuple[float, list[int]]:
        """The lowest median of nearly equal pieces; the piece's first and last step."""
        levels, starts = pieces(self.values), piece_starts(len(self.values))
        at = int(levels.argmin())
        end = [*starts, len(self.values)][at + 1]
        return float(levels[at]), [
            int(self.steps[starts[at]]),
            int(self.steps[end - 1]),
        ]


class Names(NamedTuple):
    """Columns that were named, and numbers given in place of a column."""

    loss: str | None = None
    norm: str | None = None
    threshold: str | float | int | None = None
    update_norm: str | None = None
    schedule: str | None = None
    target: float | int | None = None


class Signals:
    """The signals of a run, found by the names of its columns."""

    def __init__(
        self, columns: Columns, names: Names, back: Restarts, source: Any = "this run"
    ) -> None:
        self.columns = columns = naming.with_whole_norm(columns)
        self.source = source
        self.names = names
        self.restarts = back
        self.steps = columns[STEP]
        self._several: dict[str, str] = {}
        self._norm_name = self._find("norm", names.norm)
        self.loss = self._line(self._find("loss", names.loss))
        self.update_norm = self._line(self._find("update_norm", names.update_norm))
        self.schedule = self._line(self._find("schedule", names.schedule))
        if self.norm is None and self.loss is None and self._several:
            raise ReadError(next(iter(self._several.values())))
        if self.norm is None and self.loss is None:
            shown = ", ".join(map(repr, columns))
            raise ReadError(
                f"{source}: expected a column with the gradient norm or with the loss;"
                f" the columns are: {shown}. Name them with norm= and loss= (--norm"
                " NAME and --loss NAME on the command line)."
            )

    def _find(self, what: str, given: str | None) -> str | None:
        """The name of a column; None if there is none, or if several may be meant."""
        if given is not None:
            return self._given(what, given)
        if _OWN.get(what) in self.columns:
            return _OWN[what]
        try:
            name = naming.pick(self.columns, what, None, self.source)
        except ReadError as error:
            fitting = [n for n in self.columns if _is_of_training(n, what)]
            if len(fitting) == 1:
                return fitting[0]
            if "several columns" in str(error) and what in ("norm", "loss"):
                said = str(error).replace("--column NAME", "--loss NAME")
                self._several[what] = said
            return None
        # Any logger's "value" may be the one or the other.
        return None if name.endswith("value") else name

    def _given(self, what: str, name: str) -> str:
        """A column that was named."""
        if name not in self.columns:
            option = what.replace("_", "-")
            mend = f"{what}=NAME, or --{option} NAME on the command line"
            raise ReadError(naming.no_column(self.source, name, self.columns, mend))
        return name

    @property
    def notice(self) -> str:
        """What to do where no gradient norm was found; empty if one was."""
        if self.norm is not None:
            return ""
        if "norm" in self._several:
            return self._several["norm"]
        said = "No column with the gradient norm was found."
        like = naming.like_a_norm(self.columns)
        if not like:
            return f"{said} Name it with norm=NAME (--norm NAME), or record it."
        named = ", ".join(like[:5])
        return (
            f"{said} It may be one of these columns: {named}. If so, pass"
            f" norm={like[0]!r} (--norm {like[0]})."
        )

    def _line(self, name: str | None) -> Line | None:
        if name is None:
            return None
        values = np.asarray(self.columns[name], np.float64)
        there = present(values)
        if there.all():  # the usual case, and hundreds of leaves need no copies
            return Line(name, self.steps, values)
        return Line(name, self.steps[there], values[there]) if there.any() else None

    @cached_property
    def _norms(self) -> Norms | None:
        """The norms with what was done to them."""
        name, limit = self._norm_name, self.names.threshold
        if name is None or not present(self.columns[name]).any():
            return None
        seen = norms_of(self.columns, name, None if isinstance(limit, str) else limit)
        if isinstance(limit, str):
            limits = np.asarray(self.columns[self._given("threshold", limit)])
            limits = limits[np.isin(self.steps, seen.steps)]
            seen = seen._replace(limits=limits, clipped=seen.norms > limits)
        return seen

    @property
    def norm(self) -> Line | None:
        """The norms before clipping."""
        seen = self._norms
        if seen is None or self._norm_name is None:
            return None
        return Line(self._norm_name, seen.steps, seen.norms)

    @property
    def threshold(self) -> Line | None:
        """The threshold of each norm."""
        seen = self._norms
        if seen is None or seen.limits is None:
            return None
        return Line("threshold", seen.steps, seen.limits)

    @property
    def clipped(self) -> Line | None:
        """Which norms were clipped, where their threshold is known."""
        seen = self._norms
        if seen is None or seen.limits is None or seen.clipped is None:
            return None
        known = present(seen.limits)
        flags = seen.clipped.astype(np.float64)
        return Line("clipped", seen.steps, flags).chosen(known)

    @cached_property
    def compressed(self) -> bool:
        """Whether most steps were made shorter by design, as by `auto_clip`."""
        name = self._norm_name
        return name is not None and is_compressed(self.columns, name)

    @cached_property
    def muon_share(self) -> Line | None:
        """The share of Muon's leaves in the norm by which all leaves are scaled."""
        name = "track/muon_share"
        return self._line(name if name in self.columns else None)

    @cached_property
    def skipped(self) -> Line | None:
        """Which steps were skipped."""
        names = ("skip/skipped", "clip/skipped", "skipped")
        return self._line(next((n for n in names if n in self.columns), None))

    @cached_property
    def target(self) -> float | None:
        """The fraction of steps that the rule is to clip."""
        if self.names.target is not None:
            return float(self.names.target)
        line = self._line(self._find("target", None))
        return None if line is None else float(np.median(line.values))

    @cached_property
    def leaves(self) -> dict[str, Line]:
        """The norm of each leaf, of the steps that have one."""
        found = naming.leaves(self.columns, self._norm_name)
        lines = {leaf: self._line(name) for leaf, name in found.items()}
        return {leaf: line for leaf, line in lines.items() if line is not None}

    @cached_property
    def _end(self) -> int | None:
        """The step at which the run breaks: what follows a NaN says nothing."""
        ends = [breaks_at(self.norm), breaks_at(self.loss)]
        return min((end for end in ends if end is not None), default=None)

    def sound(self, line: Line) -> Line:
        """A line up to where the run breaks."""
        return line if self._end is None else line.before(self._end)

    @cached_property
    def sound_leaves(self) -> dict[str, Line]:
        """The norms of leaves up to where the run breaks."""
        if self._end is None:
            return self.leaves
        lines = {leaf: self.sound(line) for leaf, line in self.leaves.items()}
        return {leaf: line for leaf, line in lines.items() if len(line.steps)}

    @cached_property
    def leaf_levels(self) -> tuple[np.ndarray, np.ndarray]:
        """The medians of pieces of the run, a row a leaf, and their first steps."""
        rows = [pieces(np.abs(x.finite().values)) for x in self.sound_leaves.values()]
        count = max(map(len, rows))
        time = np.linspace(0, 1, count)
        table = np.stack(  # leaves are recorded together: nearly always as they are
            [np.interp(time, np.linspace(0, 1, len(row)), row) for row in rows]
        )
        longest = max(self.sound_leaves.values(), key=lambda line: len(line.steps))
        starts = piece_starts(len(longest.steps), count)
        return longest.steps[starts], table


def breaks_at(line: Line | None, least: int = criteria.NONFINITE_STEPS) -> int | None:
    """The step from which on a line is not finite to its end, for so many steps."""
    if line is None:
        return None
    finite = np.isfinite(line.values)
    if finite[-least:].any():
        return None
    last = np.flatnonzero(finite)
    return int(line.steps[last[-1] + 1 if len(last) else 0])


def _is_of_training(name: str, what: str) -> bool:
    """Whether a column is that of training, where others are of its evaluation."""
    parts = re.split(r"[/_. -]", name.lower())
    return parts[-1] == what and bool({"train", "training", "learning"} & set(parts))


def read(run: Any, step: str | None, names: Names) -> Signals:
    """The signals of a path, a history or a mapping of columns."""
    if isinstance(run, str | Path) or hasattr(run, "__fspath__"):
        path = readers.file_of_run(Path(run))
        return _of_table(path, readers.rows(path, step), names)
    if isinstance(run, Mapping):
        columns = _checked(run, step)
        if not np.all(np.diff(columns[STEP]) > 0):
            table = Table()
            table.extend(columns)
            return _of_table(Path("this run"), table, names)
    else:
        columns = readers.columns_of_run(run)
        if not len(columns[STEP]):
            raise ReadError("There are no records to judge. Was anything appended?")
        written = getattr(run, "path", None)
        if written is not None:
            return Signals(columns, names, _dropped(written), written)
    return Signals(columns, names, Restarts())


def _of_table(path: Path, table: Table, names: Names) -> Signals:
    back = restarts(table)
    if not back.steps:
        back = _dropped(path)
    if back.mixed:  # of which run a row is, nobody can tell
        return Signals(table.arrays(), names, back, path)
    with warnings.catch_warnings():  # it is a finding
        warnings.filterwarnings("ignore", ".*steps go back at record", UserWarning)
        return Signals(one_row_a_step(path, table).arrays(), names, back, path)


def _dropped(path: Path) -> Restarts:
    """The restarts of a `History`: what is run again goes to a file beside it."""
    try:
        steps = readers.rows(f"{path}.dropped", STEP).arrays()[STEP]
    except (ReadError, OSError):
        return Restarts()
    gaps = np.diff(steps)
    usual = np.median(gaps[gaps > 0]) if (gaps > 0).any() else 1
    begins = np.append(True, (gaps <= 0) | (gaps > 2 * usual))
    ends = np.append(begins[1:], True)
    first, last = steps[begins].tolist(), steps[ends].tolist()
    return Restarts(tuple(first), tuple(last), dropped=True)


def _checked(run: Mapping[str, Any], step: str | None) -> Columns:
    """Columns of one length, with the step as integers."""
    columns = {name: _column(name, values) for name, values in run.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ReadError(
            f"Expected columns of one length above 0, got lengths {lengths}. Pass one"
            " number for each step; None where there is none."
        )
    if step is not None and step not in columns:
        raise ReadError(naming.no_column("this run", step, columns, "step=NAME"))
    name = step or next((n for n in naming.STEP_NAMES if n in columns), None)
    steps = columns.pop(name) if name else np.arange(next(iter(lengths.values())))
    if not np.all((np.abs(steps) <= 2**53) & (steps == np.round(steps))):
        raise ReadError(f"Expected whole numbers in {name!r}, got {steps[:5]}.")
    return {STEP: steps.astype(np.int64), **columns}


def _column(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values)
        if found.dtype.kind == "O":
            lacking = [x is None for x in found.flat]
            found = np.where(np.reshape(lacking, found.shape), MISSING, found)
        found = found.astype(np.float64, copy=False)
    except (TypeError, ValueError):
        raise ReadError(f"Expected numbers in {name!r}, got {values!r:.60}.") from None
    if found.ndim != 1:
        raise ReadError(
            f"Expected one number a step in {name!r}, got shape {found.shape}. Seeds"
            " are runs of their own: diagnose {name: x[:, 0] for name, x in ...}."
        )
    return found
