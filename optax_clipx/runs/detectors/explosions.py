"""Runs that explode in their first steps, which are too few for levels and noise."""

from typing import NamedTuple

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..signals import Line, Signals


class _Explosion(NamedTuple):
    """The last place that is not twice the lowest value, and the growth from there."""

    begin: int
    rise: float


def loss(run: Signals) -> list[Finding]:
    """A positive loss that grows by orders of magnitude."""
    assert run.loss is not None
    line = run.loss.finite()
    if (line.values <= 0).any():
        return []
    found = _explosion(line.logs(), _breaks(run))
    if found is None:
        return []
    end = float(run.loss.values[-1])
    return [
        finding(
            "loss-diverged",
            "error",
            [line.steps[found.begin + 1]],
            best=float(line.values.min()),
            end=end,
            column=line.name,
        )
    ]


def norms(run: Signals) -> list[Finding]:
    """Norms that grow by orders of magnitude, in more than one step."""
    assert run.norm is not None
    norm, breaks = run.norm.logs(), _breaks(run)
    found = _explosion(norm, breaks)
    if found is None:
        return []
    rising = norm.values[found.begin :]
    at_once = np.diff(rising).max() > criteria.GROWTH_AT_ONCE * found.rise
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
    if not 2 <= len(values) < most:
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
    return _Explosion(begin, float(values[-1] - values[begin]))
