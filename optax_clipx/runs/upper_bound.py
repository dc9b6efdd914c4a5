"""The upper bound of an adaptive threshold: three times the usual norm."""

import numpy as np

from . import criteria
from .signals import Line

_TIMES = 3  # above usual norms, and far below those of an explosion


def usual_norm(norms: Line | None, before: float | int = np.inf) -> float | None:
    """The median before a step; None if too few numbers are known."""
    if norms is None:
        return None
    values = norms.logs().before(before).values
    few = len(values) < criteria.LEAST_IN_WINDOW
    return None if few else float(np.exp(np.median(values)))


def upper_bound(usual: float) -> float:
    """Three times the usual norm, to two digits."""
    with np.errstate(over="ignore"):  # norms may be at the end of the range
        return float(f"{_TIMES * usual:.2g}")


def told(usual: float, of_what: str) -> str:
    """Where an upper bound comes from."""
    return f"{upper_bound(usual):g} is 3 times {of_what}, {usual:.3g}"
