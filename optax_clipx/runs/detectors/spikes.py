"""Spikes of the gradient norm: single ones, and ones at equal distances."""

from typing import NamedTuple

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..levels import around, folded, peaks, residuals, spread
from ..signals import Line, Signals, breaks_at
from .divergence import ends_at

_TRIED = 500  # of the spikes, to find out whether they are periodic


def judge(run: Signals) -> list[Finding]:
    """Single spikes and periodic ones; one spike counts as one of the two."""
    assert run.norm is not None
    norm = run.norm.logs()
    if len(norm.steps) < criteria.LEAST_STEPS:
        return []
    steps, heights, found = *_peaks(norm, criteria.FALSE_SPIKES), []
    regular = _regular(norm)
    if regular is not None:
        found.append(
            finding(
                "periodic-spikes",
                "warning",
                regular.steps,
                period=regular.period,
                count=len(regular.steps),
                factor=float(np.exp(np.median(regular.heights))),
                column=run.norm.name,
            )
        )
        beside = np.arange(1 - criteria.SPIKE_GAP, criteria.SPIKE_GAP)
        alone = ~np.isin(steps, np.add.outer(regular.steps, beside))
    else:
        alone = np.ones(len(steps), bool)
    if alone.any():
        found.append(_single(run, steps[alone], heights[alone]))
    return found


class _Regular(NamedTuple):
    """Spikes at equal distances, with the logarithms of their heights."""

    period: int
    steps: np.ndarray
    heights: np.ndarray


def _regular(norm: Line) -> _Regular | None:
    """Spikes at equal distances, whether or not each is beyond chance alone."""
    many, heights = _peaks(norm, criteria.FALSE_PERIODIC)
    period, in_time = _period(many)
    if period:
        return _Regular(period, many[in_time], heights[in_time])
    above = residuals(norm.values)
    places = folded(above)
    if places is None:
        return None
    high = places[above[places] >= criteria.SPIKE]
    enough = max(criteria.PERIODIC_LEAST, criteria.PERIODIC_SHARE * len(places))
    if len(high) < enough:
        return None
    steps = norm.steps[high]
    return _Regular(round(float(np.median(np.diff(steps)))), steps, above[high])


def _peaks(norm: Line, false: float) -> tuple[np.ndarray, np.ndarray]:
    """The steps of spikes and the logarithms of their heights."""
    at, heights = peaks(norm.values, criteria.SPIKE, false)
    return norm.steps[at], heights


def _single(run: Signals, steps: np.ndarray, heights: np.ndarray) -> Finding:
    evidence = {
        "count": len(steps),
        "factor": float(np.exp(heights.max())),
        "not_recovered": 0 if run.loss else "unknown",
        "column": run.norm.name if run.norm else "",
    }
    severity = "warning"
    if run.loss is not None:
        lost = _not_recovered(run.loss.finite(), steps)
        # Before a divergence there is no time to recover, and within one no level.
        lost |= steps + criteria.RECOVERY_STEPS >= _end(run, run.loss)
        evidence["not_recovered"] = int(lost.sum())
        if lost.any():
            evidence["first_not_recovered"] = int(steps[lost][0])
            severity = "error"
        elif _all_clipped(run, steps):
            evidence["all_clipped"] = True
            severity = "info"
    return finding("spikes", severity, steps, **evidence)


def _all_clipped(run: Signals, steps: np.ndarray) -> bool:
    """Whether it is known of each of these steps that it was clipped."""
    if run.clipped is None:
        return False
    return bool(np.isin(steps, run.clipped.steps[run.clipped.values > 0]).all())


def _end(run: Signals, loss: Line) -> float:
    """The step at which a run diverges, or from which on its loss is not finite."""
    breaks = breaks_at(loss, 1)
    return min(ends_at(run), np.inf if breaks is None else float(breaks))


def _not_recovered(loss: Line, steps: np.ndarray) -> np.ndarray:
    """After which spikes the loss stays above the level before them."""
    if len(loss.steps) < criteria.LEAST_STEPS:
        return np.zeros(len(steps), bool)
    last = len(loss.steps) - 1  # a norm may come after the last finite loss
    here = np.minimum(np.searchsorted(loss.steps, steps), last)
    later = np.searchsorted(loss.steps, steps + criteria.RECOVERY_STEPS)
    before, _ = around(loss.values, here)
    _, after = around(loss.values, np.minimum(later, last))
    noise = spread(residuals(loss.values))
    return after - before > criteria.RECOVERY_DEVIATIONS * noise  # false for NaN


def _period(steps: np.ndarray) -> tuple[int, np.ndarray]:
    """The distance at which most spikes follow each other, and which of them do.

    Of the distances between neighbours, the commonest is tried; one spike that is
    missing makes a distance of two periods.
    """
    none = 0, np.zeros(len(steps), bool)
    if len(steps) < criteria.PERIODIC_LEAST:
        return none
    gaps = np.diff(steps)[:_TRIED]
    allowed = np.maximum(1, criteria.PERIODIC_TOLERANCE * gaps)
    near = np.abs(gaps[:, None] - gaps[None, :]) <= allowed[:, None]
    period = float(np.median(gaps[near[:, near.sum(axis=0).argmax()]]))
    if period < 2 * criteria.SPIKE_GAP:
        return none
    first = steps[:_TRIED]
    best = _in_time(first[:, None], first[None, :], period).sum(axis=0).argmax()
    in_time = _in_time(steps, first[best : best + 1], period)
    chosen = steps[in_time]
    possible = 1 + (chosen[-1] - chosen[0]) / period
    enough = in_time.sum() >= max(
        criteria.PERIODIC_LEAST, criteria.PERIODIC_SHARE * possible
    )
    return (round(period), in_time) if enough else none


def _in_time(steps: np.ndarray, start: np.ndarray, period: float) -> np.ndarray:
    """Which steps are whole periods away from the start."""
    phase = np.abs(steps - start - np.round((steps - start) / period) * period)
    return phase <= max(1, criteria.PERIODIC_TOLERANCE * period)
