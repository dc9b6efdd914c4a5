"""Levels of the gradient norm that change at one step, or follow the schedule."""

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..levels import pieces, ranks_agree, residuals, shifts, spread
from ..signals import Line, Signals


def level(run: Signals) -> list[Finding]:
    """Steps at which the norm takes another level at once."""
    assert run.norm is not None
    norm = run.norm.logs()
    found = shifts(norm.values)
    if not found:
        return []
    changes = np.array([change for _, change in found])
    harmless = (changes < 0) & (changes > -criteria.SHIFT_FALL)
    return [
        finding(
            "level-shift",
            "info" if harmless.all() else "warning",
            [norm.steps[place] for place, _ in found],
            factors=[float(np.exp(change)) for _, change in found],
            column=run.norm.name,
        )
    ]


def schedule(run: Signals) -> list[Finding]:
    """Norms that rise while the learning rate falls."""
    assert run.norm is not None
    assert run.schedule is not None
    norm, rate = run.norm.logs(), run.schedule.logs()
    if min(len(norm.steps), len(rate.steps)) < criteria.LEAST_STEPS:
        return []
    peak = rate.steps[len(rate.steps) - 1 - int(rate.values[::-1].argmax())]
    norm = norm.chosen(norm.steps >= peak)
    if len(norm.steps) < criteria.LEAST_STEPS:
        return []
    beside = np.interp(norm.steps, rate.steps, rate.values)
    for count in criteria.SCHEDULE_PIECES:
        found = _opposed(run, norm, beside, count)
        if found:
            return found
    return []


def _opposed(run: Signals, norm: Line, rate: np.ndarray, count: int) -> list[Finding]:
    """Levels of so many pieces of a run that rise while those of the rate fall."""
    norms, rates = pieces(norm.values, count), pieces(rate, count)
    lowest = int(norms.argmin())  # norms may fall at first, as the loss does
    rise, fall = norms[-1] - norms[lowest], rates.max() - rates[-1]
    # Of medians of so many steps, each with the noise of one.
    error = 1.25 * spread(residuals(norm.values)) * np.sqrt(2 * count / len(norm.steps))
    least = max(criteria.SCHEDULE_RISE, criteria.SCHEDULE_ERRORS * error)
    if rise < least or fall < criteria.SCHEDULE_FALL:
        return []
    if len(norms) - lowest < criteria.SCHEDULE_PART * len(norms):
        return []
    together = ranks_agree(norms[lowest:], rates[lowest:])
    if together > criteria.SCHEDULE_RANK:
        return []
    return [
        finding(
            "rises-with-schedule",
            "warning",
            [norm.steps[0], norm.steps[-1]],
            factor=float(np.exp(rise)),
            learning_rate_factor=float(np.exp(-fall)),
            correlation=together,
            column=norm.name,
        )
    ]
