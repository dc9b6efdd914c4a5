"""Levels, noise and jumps of a series, by medians: no single step moves them."""

import warnings

import numpy as np

from . import criteria


def spread(values: np.ndarray) -> float:
    """The standard deviation as the median absolute deviation tells it."""
    if not len(values):
        return 0.0
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def pieces(values: np.ndarray, count: int = criteria.PIECES) -> np.ndarray:
    """The medians of nearly equal pieces, at most so many; 0 where there is nothing."""
    if not len(values):
        return np.zeros(1)
    return np.array([np.median(x) for x in np.array_split(values, _few(values, count))])


def piece_starts(length: int, count: int = criteria.PIECES) -> np.ndarray:
    """Where the pieces of a series of that length begin."""
    few = _few(range(length), count)
    sizes = [len(x) for x in np.array_split(np.empty(length, bool), few)]
    return np.cumsum([0, *sizes[:-1]])


def _few(values: np.ndarray | range, count: int) -> int:
    return max(1, min(count, len(values) // 5))


def residuals(values: np.ndarray, each: int = 2 * criteria.WINDOW) -> np.ndarray:
    """Values above their level, which is drawn through medians of stretches."""
    each = min(each, len(values))
    count = len(values) // each
    middles = (np.arange(count) + 0.5) * each
    whole = np.median(values[: count * each].reshape(count, -1), axis=1)
    return values - np.interp(np.arange(len(values)), middles, whole)


def around(
    values: np.ndarray, at: np.ndarray, side: int = criteria.WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """The medians of the steps before and after some; NaN where there are few."""
    padding = np.full(side, np.nan)
    padded = np.concatenate([padding, values, padding])
    windows = np.lib.stride_tricks.sliding_window_view(padded, side)
    before, after = [], []
    for some in np.array_split(at, 1 + len(at) // 100_000):  # bounds the memory
        before.append(_medians(windows[some]))
        after.append(_medians(windows[some + side + 1]))
    return np.concatenate(before), np.concatenate(after)


def _medians(windows: np.ndarray) -> np.ndarray:
    enough = np.isfinite(windows).sum(axis=1) >= criteria.LEAST_IN_WINDOW
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of windows without numbers
        return np.where(enough, np.nanmedian(windows, axis=1), np.nan)


def margin(
    above: np.ndarray, least: float, false: float = criteria.FALSE_SPIKES
) -> float:
    """How far above the level chance does not reach, but for so many times a run."""
    low, high = np.quantile(above, criteria.TAIL)
    outside = 1 - criteria.TAIL[0]
    scale = (high - low) / np.log(outside / (1 - criteria.TAIL[1]))
    tail = low + scale * np.log(outside * len(above) / false)
    return max(least, min(float(tail), criteria.MOST_DEVIATIONS * spread(above)))


def peaks(
    values: np.ndarray, least: float, false: float = criteria.FALSE_SPIKES
) -> tuple[np.ndarray, np.ndarray]:
    """Where values are above the levels before and after, and by how much."""
    above = residuals(values)
    enough = margin(above, least, false)
    at = np.flatnonzero(above > 0.5 * enough)
    before, after = around(values, at)
    high = values[at] - np.maximum(before, after)
    chosen = high > enough  # false for NaN
    return _highest_of_each(at[chosen], high[chosen])


def _highest_of_each(at: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first step of each group of neighbours, with its greatest height."""
    if not len(at):
        return at, high
    starts = np.flatnonzero(np.append(True, np.diff(at) > criteria.SPIKE_GAP))
    return at[starts], np.maximum.reduceat(high, starts)


def rises(values: np.ndarray, least: float) -> np.ndarray:
    """Where values go above the level before them, whether or not they come back."""
    enough = margin(residuals(values), least)
    each, count = criteria.WINDOW, len(values) // criteria.WINDOW
    if count < 2:
        return np.array([], np.int64)
    # Near a lasting rise the level is above: that of the steps before tells.
    level = np.median(values[: count * each].reshape(count, each), axis=1)
    earlier = np.repeat(level, each)[: len(values) - each]
    at = each + np.flatnonzero(
        values[each : each + len(earlier)] - earlier > enough / 4
    )
    before, _ = around(values, at)
    at = at[values[at] - before > enough]
    return at[np.append(True, np.diff(at) > criteria.WINDOW)] if len(at) else at


def shifts(values: np.ndarray) -> list[tuple[int, float]]:
    """Where the level changes within a few steps and stays: places and changes."""
    each = 10 if len(values) >= 500 else 5
    side = criteria.SHIFT_SIDE // each
    count = len(values) // each
    if count < 2 * side + 2:
        return []
    short = np.median(values[: count * each].reshape(count, each), axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(short, side)
    levels = np.median(windows, axis=1)
    change = levels[side:] - levels[:-side]  # at the block `side` further on
    size, noise = np.abs(change), spread(change)
    settled = np.arange(len(change)) + side >= criteria.SHIFT_SETTLED * count
    deviations = np.where(
        settled, criteria.SHIFT_DEVIATIONS, criteria.SHIFT_EARLY_DEVIATIONS
    )
    least = np.maximum(criteria.SHIFT, deviations * noise)
    around_it = np.lib.stride_tricks.sliding_window_view(
        np.pad(size, side), 2 * side + 1
    )
    found = {}
    early = max(criteria.SHIFT_SIDE, criteria.SHIFT_EARLY * len(values))
    for k in np.flatnonzero((size > least) & (size == around_it.max(axis=1))):
        place = split(values, int(k) * each, (int(k) + 2 * side) * each)
        if place >= early and _is_sharp(values, place, float(change[k])):
            found[place] = float(change[k])
    return sorted(found.items())


def split(values: np.ndarray, low: int, high: int) -> int:
    """Where two levels, one before and one after, describe a stretch best."""
    low = max(0, low)
    part = _without_spikes(values[low:high])
    count = np.arange(1, len(part))
    sums = np.cumsum(part)
    before, after = sums[:-1] / count, (sums[-1] - sums[:-1]) / count[::-1]
    gain = count * count[::-1] * (before - after) ** 2
    return low + 1 + int(gain.argmax())


def _without_spikes(values: np.ndarray) -> np.ndarray:
    """A stretch whose spikes are cut off, if it has any noise: they are no level."""
    middle, wide = np.median(values), 3 * spread(values)
    return np.clip(values, middle - wide, middle + wide) if wide else values


def _is_sharp(values: np.ndarray, place: int, change: float) -> bool:
    """Whether a change is no drift, stays, and is seen in most pairs of steps."""
    side = criteria.SHIFT_SIDE
    start = max(0, place - side)
    before, after = values[start:place], values[place : place + side]
    stays = np.median(values[place : place + 2 * side]) - np.median(before)
    pairs = np.sign(after[:, None] - before) * np.sign(change)
    part = _without_spikes(np.append(before, after))
    time = np.arange(len(part), dtype=float)
    levels, line = (_explained(part, x) for x in (time >= len(before), time))
    return bool(
        stays / change > criteria.SHIFT_STAYS
        and pairs.mean() >= criteria.SHIFT_RANK
        and levels >= criteria.SHIFT_SHARP * line
    )


def _explained(values: np.ndarray, by: np.ndarray) -> float:
    """The sum of squares that a least-squares fit by one series explains."""
    centred = by - by.mean()
    return float((centred @ (values - values.mean())) ** 2 / (centred @ centred))


def ranks_agree(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks; 0 where one of them does not vary."""
    ranks = [np.argsort(np.argsort(x, kind="stable")) for x in (a, b)]
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return 0.0
    return float(np.atleast_2d(np.corrcoef(ranks))[0, 1])


def bend(values: np.ndarray) -> int:
    """Where values that were level begin to rise or fall in a straight line."""
    each = max(1, len(values) // 400)
    count = len(values) // each
    short = np.median(values[: count * each].reshape(count, each), axis=1)
    time, centred = np.arange(count, dtype=float), short - short.mean()
    best, place = 0.0, 0
    for start in range(max(1, count - 2)):
        hinge = np.maximum(time - start, 0)
        hinge -= hinge.mean()
        # What the least-squares line explains; both have the mean taken off.
        explained = float(hinge @ centred) ** 2 / max(float(hinge @ hinge), 1e-300)
        if explained > best:
            best, place = explained, start
    return place * each
