"""Runs that explode within few steps: at their start, or at their end."""

from typing import NamedTuple

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..signals import Line, Signals


class _Explosion(NamedTuple):
    """The last place before the growth, the growth from there, and whether late."""

    begin: int
    rise: float
    late: bool


def loss(run: Signals) -> list[Finding]:
    """A positive loss that grows by orders of magnitude."""
    assert run.loss is not None
    line = run.loss.finite()
    if (line.values <= 0).any():
        return []
    found = _explosion(line.logs(), _breaks(run))
    if found is None:
        return []
    highest, lowest = int(line.values.argmax()), int(line.values.argmin())
    best, best_steps = float(line.values[lowest]), [int(line.steps[lowest])] * 2
    if found.late:
        best, best_steps = line.best()
    return [
        finding(
            "loss-diverged",
            "error",
            [line.steps[found.begin + 1]],
            best=best,
            best_steps=best_steps,
            end=float(run.loss.values[-1]),
            end_steps=[int(run.loss.steps[-1])] * 2,
            highest=float(line.values[highest]),
            highest_step=int(line.steps[highest]),
            column=line.name,
        )
    ]


def begins(run: Signals) -> int | None:
    """The step at which the loss explodes; None if it does not."""
    found = loss(run) if run.loss is not None else []
    return found[0].steps[0] if found else None


def norms(run: Signals) -> list[Finding]:
    """Norms that grow by orders of magnitude, in more than one step."""
    assert run.norm is not None
    norm, breaks = run.norm.logs(), _breaks(run)
    found = _explosion(norm, breaks)
    if found is None:
        return []
    rising = norm.values[found.begin :]
    largest = np.diff(rising).max()
    at_once = largest > criteria.GROWTH_AT_ONCE * found.rise
    at_once &= found.rise - largest < criteria.EXPLODED_TO_NONFINITE
    if at_once and found.begin >= criteria.LEAST_IN_WINDOW:
        return []  # a level shift, or one bad batch
    return [
        finding(
            "growing-norms",
            "error",
            [norm.steps[found.begin], norm.steps[-1]],
            factor=float(np.exp(found.rise)),
            warned=int(norm.steps[found.begin + 1]),
            diverged=int(_after(norm, run)) if breaks else "no",
            column=norm.name,
        )
    ]


def _breaks(run: Signals) -> bool:
    """Whether the loss or the norm is not finite at the end."""
    lines = [line for line in (run.loss, run.norm) if line is not None]
    return not all(np.isfinite(line.values[-1]) for line in lines)


def _after(line: Line, run: Signals) -> int:
    """The first step after those of a line."""
    later = run.steps[run.steps > line.steps[-1]]
    return int(later[0] if len(later) else line.steps[-1])


def _explosion(logs: Line, breaks: bool) -> _Explosion | None:
    """The growth of a series from near its lowest value to its last ones."""
    values = logs.values
    most = criteria.EXPLODED_STEPS if breaks else criteria.LEAST_STEPS
    if len(values) >= most:
        return _late_explosion(values, breaks)
    if len(values) < 2:
        return None
    low = values.min()
    begin = int(np.flatnonzero(values <= low + criteria.WARNED)[-1])
    early = begin < criteria.LEAST_IN_WINDOW
    if len(values) - begin <= (1 if early else criteria.EXPLODED_RISING):
        return None
    last = values[-1] if breaks else np.median(values[-criteria.LEAST_IN_WINDOW :])
    least = criteria.EXPLODED_TO_NONFINITE if breaks else criteria.EXPLODED
    before = values[: begin + 1].max() + criteria.EXPLODED_ABOVE
    if last < max(low + least, before):
        return None
    return _Explosion(begin, float(values[-1] - values[begin]), False)


def _late_explosion(values: np.ndarray, breaks: bool) -> _Explosion | None:
    """The growth at the end of a longer series, above all values before it."""
    tail = min(criteria.EXPLODED_TAIL, len(values) // 2)
    before = values[:-tail]
    level = before[-criteria.EXPLODED_BESIDE :].max()
    begin = int(np.flatnonzero(values <= level)[-1])
    rising = values[begin + 1 :]
    if len(rising) < criteria.EXPLODED_RISING:
        return None
    least = criteria.EXPLODED_TO_NONFINITE if breaks else criteria.EXPLODED
    last = values[-1] if breaks else values[-2:].min()
    if last < max(level + least, before.max() + criteria.EXPLODED_ABOVE):
        return None
    usual = float(np.median(before[-criteria.EXPLODED_BESIDE :]))
    return _Explosion(begin, float(values[-1] - usual), True)
