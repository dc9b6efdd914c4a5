"""Losses that are lost again, and what grew before: norms, or the updates' norms."""

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..levels import (
    bend,
    piece_starts,
    pieces,
    ranks_agree,
    residuals,
    rises,
    split,
    spread,
)
from ..signals import Line, Signals, breaks_at
from . import explosions


def loss(run: Signals) -> list[Finding]:
    """A loss that ends far above its best level."""
    assert run.loss is not None
    line = run.loss.finite()
    place = _departure(line)
    if place is None:
        return explosions.loss(run)
    best, best_steps = line.best()
    end, end_steps = _last_level(run.loss)
    return [
        finding(
            "loss-diverged",
            "error",
            [line.steps[place]],
            best=best,
            best_steps=best_steps,
            end=end,
            end_steps=end_steps,
            column=line.name,
        )
    ]


def _last_level(loss: Line) -> tuple[float, list[int]]:
    """The median of the last losses, and their steps; NaN if they end so."""
    last = float(loss.values[-1])
    if not np.isfinite(last):
        return last, [int(loss.steps[-1])] * 2
    line = loss.finite()
    first = line.steps[-criteria.WINDOW :][0]
    level = float(np.median(line.values[-criteria.WINDOW :]))
    return level, [int(first), int(line.steps[-1])]


def diverged_at(run: Signals) -> int | None:
    """The step at which the loss leaves its good level, or stops to be finite."""
    if run.loss is None:
        return None
    line = run.loss.finite()
    place = _departure(line)
    return breaks_at(run.loss) if place is None else int(line.steps[place])


def _departure(line: Line) -> int | None:
    """Where the loss leaves its best level for good; None if it does not."""
    if len(line.steps) < criteria.LEAST_STEPS:
        return None
    levels, starts = pieces(line.values), piece_starts(len(line.values))
    best = int(levels.argmin())
    lost = float(np.median(line.values[-criteria.WINDOW :])) - levels[best]
    if best == len(levels) - 1 or lost <= _least_loss(line, levels):
        return None
    local = spread(line.values[starts[best] : starts[best + 1]])
    enough = criteria.DEPARTED_DEVIATIONS * local
    at_once = split(line.values, int(starts[best]), len(line.values))
    if lost < 2 * enough:  # single steps are on the good level by chance
        return at_once
    # The last step on the good level; a spike that was recovered from is before it.
    bound = levels[best] + max(enough, criteria.DEPARTED_PART * lost)
    good = line.values <= bound
    last = int(np.flatnonzero(good)[-1])
    # So are some of a divergence that is very noisy.
    if last > at_once and good[at_once : last + 1].mean() < criteria.DEPARTED_GOOD:
        return at_once
    return min(last + 1, len(line.values) - 1)


def _least_loss(line: Line, levels: np.ndarray) -> float:
    """How far above its best level a loss has to end to have diverged."""
    best = levels.min()
    above = residuals(line.values)
    before = above[: piece_starts(len(above))[int(levels.argmin())]]
    at_end = spread(above[-2 * criteria.WINDOW :])
    noise = max(spread(before), criteria.LOST_END * at_end)
    if best < 0:
        noise = max(noise, at_end)
        gained = max(levels[0], line.values[0]) - best
        least = criteria.LOST_SHARE_BELOW_ZERO * gained
    else:
        gained = levels[0] - best
        least = max(criteria.LOST_SHARE * gained, criteria.LOST_PART * best)
    return float(max(least, criteria.LOST_DEVIATIONS * noise))


def norms(run: Signals) -> list[Finding]:
    """Norms that grow for long, before a divergence or with a loss that stays."""
    assert run.norm is not None
    end = ends_at(run)
    norm = run.norm.logs().before(end)
    parts = criteria.GROWTH_PARTS if end < np.inf else (1,)
    rows = np.arange(len(norm.steps))
    tails = [norm.chosen(rows >= len(rows) * (1 - part)) for part in parts]
    whole = run.norm.logs()
    after = len(whole.steps) - len(norm.steps)
    if end < np.inf and after >= criteria.GROWTH_AFTER * len(whole.steps):
        tails.append(whole)
    for count, quantile in criteria.GROWTH_LEVELS:
        for tail in tails:
            found = _growth(run, tail, end, (count, quantile))
            if found:
                return found
    return explosions.norms(run)


def ends_at(run: Signals) -> float:
    """The step at which a run diverges; infinity if it does not."""
    ends = [diverged_at(run), breaks_at(run.norm)]
    return min((float(end) for end in ends if end is not None), default=np.inf)


def _growth(
    run: Signals, norm: Line, end: float, cut: tuple[int, float]
) -> list[Finding]:
    if len(norm.steps) < criteria.LEAST_STEPS:
        return []
    levels, starts = pieces(norm.values, *cut), piece_starts(len(norm.values), cut[0])
    lowest = levels.min()
    flat = levels <= lowest + criteria.GROWTH_FLAT * (levels[-1] - lowest)
    low = int(np.flatnonzero(flat)[-1])
    rising = levels[low:]
    rise = float(rising[-1] - rising[0])
    least = criteria.GROWTH if end == np.inf else criteria.GROWTH_BEFORE_DIVERGENCE
    if len(rising) < criteria.GROWTH_PIECES or rise < least:
        return []
    at_once = np.diff(rising).max() > criteria.GROWTH_AT_ONCE * rise
    together = ranks_agree(rising, np.arange(len(rising)))
    begin = int(norm.steps[starts[low]])
    before = float(np.quantile(levels[: low + 1], 0.8))
    back = rising[-1] < before + criteria.GROWTH_ABOVE
    if at_once or back or together < criteria.GROWTH_RANK:
        return []
    if end == np.inf and _loss_falls(run, begin):
        return []
    around_it = norm.chosen(np.arange(len(norm.steps)) >= starts[low] // 2)
    onset = around_it.steps[bend(around_it.values)]
    warned = starts[low + int(np.argmax(rising > rising[0] + criteria.WARNED))]
    return [
        finding(
            "growing-norms",
            "error" if end < np.inf else "warning",
            [onset, norm.steps[-1]],
            factor=float(np.exp(rise)),
            **{"warned": int(norm.steps[warned])},
            diverged=int(end) if end < np.inf else "no",
            column=norm.name,
        )
    ]


def _loss_falls(run: Signals, begin: int) -> bool:
    """Whether the loss is better at the end than when the norms began to grow."""
    if run.loss is None:
        return False
    later = run.loss.finite()
    later = later.chosen(later.steps >= begin)
    if len(later.steps) < criteria.LEAST_STEPS:
        return True
    levels = pieces(later.values)
    noise = spread(residuals(later.values))
    return bool(levels[0] - levels[-1] > noise / 2)


def updates(run: Signals) -> list[Finding]:
    """Updates that grow at once, and the loss a few steps later, not the gradient."""
    assert run.loss is not None
    assert run.update_norm is not None
    update, loss_line = run.update_norm.logs(), run.loss.finite()
    if len(loss_line.values) and loss_line.values.min() > 0:
        loss_line, least = loss_line.logs(), criteria.LOSS_RISE
    else:
        least = 0.0
    if min(len(update.steps), len(loss_line.steps)) < criteria.LEAST_STEPS:
        return []
    norm = run.norm.logs() if run.norm is not None else None
    pairs = []
    risen = rises(update.values, criteria.UPDATE_RISE)
    for step in update.steps[risen].tolist():
        before = step - criteria.UPDATE_LEAD
        if norm is not None and len(_lifted(norm, before, step, criteria.UPDATE_RISE)):
            continue
        end = step + criteria.UPDATE_LEAD
        later = _lifted(loss_line, step, end, least)
        if not len(later):
            later = _above_all(loss_line, step, end)
        if len(later):
            pairs.append((step, _first_above(loss_line, step, int(later[0]))))
    if not pairs:
        return []
    leads = [later - step for step, later in pairs]
    end = explosions.begins(run) or ends_at(run)
    fatal = any(step <= end <= step + criteria.UPDATE_LEAD for step, _ in pairs)
    return [
        finding(
            "update-before-loss",
            "error" if fatal else "warning",
            [step for step, _ in pairs],
            count=len(pairs),
            **{"lead": float(np.median(leads))},
            column=update.name,
        )
    ]


def _lifted(line: Line, step: int, end: int, least: float) -> np.ndarray:
    """The steps after one, up to another, above the noise of the 50 steps before."""
    first, here, last = np.searchsorted(line.steps, [step - 50, step, end], "right")
    before = line.values[first:here]
    if len(before) < criteria.LEAST_IN_WINDOW:
        return np.array([], np.int64)
    noise = criteria.LED_DEVIATIONS * spread(before)
    bound = np.median(before) + max(least, noise)
    return line.steps[here:last][line.values[here:last] > bound]


def _first_above(line: Line, step: int, lifted: int) -> int:
    """The first step, up to another, that is above all of the 50 before the first."""
    first, here, last = np.searchsorted(line.steps, [step - 50, step, lifted], "right")
    above = line.values[here:last] > line.values[first:here].max()
    return int(line.steps[here + int(above.argmax())]) if above.any() else lifted


def _above_all(line: Line, step: int, end: int) -> np.ndarray:
    """The steps after one that are above all of the 50 before it, if they are many.

    Where losses vary by factors of ten from batch to batch, none is far outside their
    noise. By chance, five of 20 are above all of 50 once in 700 times.
    """
    first, here, last = np.searchsorted(line.steps, [step - 50, step, end], "right")
    before, after = line.values[first:here], line.values[here:last]
    if len(before) < 2 * criteria.UPDATE_LEAD:
        return np.array([], np.int64)
    above = line.steps[here:last][after > before.max()]
    return above if len(above) >= criteria.LED_STEPS else above[:0]
