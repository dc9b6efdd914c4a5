"""Learning rates that jump: where, from which value and to which."""

from typing import NamedTuple

import numpy as np

from . import criteria


class Jump(NamedTuple):
    """A jump of the learning rate.

    Attributes:
        step: the first step with the higher rate.
        before: the rate before it.
        after: the highest rate of the steps from there on.
    """

    step: int
    before: float
    after: float


def jump(steps: np.ndarray, rates: np.ndarray, near: int) -> Jump | None:
    """The jump of a learning rate shortly before a step; None if there is none."""
    keep = np.isfinite(rates) & (rates > 0)
    steps, values = steps[keep], np.log(rates[keep])
    rows = np.arange(len(steps))
    earlier = np.searchsorted(steps, steps - criteria.JUMP_WITHIN)
    earlier = np.maximum(np.minimum(earlier, rows - 1), 0)
    jumped = (values - values[earlier] >= criteria.JUMP) & (rows >= criteria.JUMP_FIRST)
    jumped &= steps >= near - criteria.JUMP_LEAD
    jumped &= steps <= near + criteria.JUMP_LATE
    if not jumped.any():
        return None
    at = int(jumped.argmax())
    high = values[at : at + criteria.JUMP_WITHIN].max()
    return Jump(int(steps[at]), float(np.exp(values[earlier[at]])), float(np.exp(high)))
