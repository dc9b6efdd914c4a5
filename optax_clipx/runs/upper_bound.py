"""The upper bound of an adaptive threshold: three times the usual norm."""

from typing import NamedTuple

import numpy as np

from . import criteria
from .signals import Line

_TIMES = 3  # above usual norms, and far below those of an explosion
_FALLEN = np.log(1.25)  # so far below the median of all, norms have fallen


class Usual(NamedTuple):
    """A median norm, and of which steps it is the median."""

    norm: float
    of_what: str


def usual_norm(
    norms: Line | None, what: str, before: float | int = np.inf
) -> Usual | None:
    """The median before a step, or the recent one of norms that fell until then.

    It is None if too few numbers are known.
    """
    if norms is None:
        return None
    if before < np.inf:
        what += f" before step {before:,}"
    values = norms.logs().before(before).values
    if len(values) < criteria.LEAST_IN_WINDOW:
        return None
    all_of_them, recent = np.median(values), np.median(values[-(len(values) // 3) :])
    if len(values) >= criteria.LEAST_STEPS and recent < all_of_them - _FALLEN:
        return Usual(float(np.exp(recent)), f"{what} (last third of these steps)")
    return Usual(float(np.exp(all_of_them)), what)


def upper_bound(usual: float) -> float:
    """Three times the usual norm, to two digits."""
    with np.errstate(over="ignore"):  # norms may be at the end of the range
        return float(f"{_TIMES * usual:.2g}")


def told(usual: Usual) -> str:
    """Where an upper bound comes from."""
    return f"{upper_bound(usual.norm):g} is 3 times {usual.of_what}, {usual.norm:.3g}"
