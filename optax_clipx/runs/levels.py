"""Levels, noise and jumps of a series, by medians: no single step moves them."""

import itertools
import warnings

import numpy as np

from . import criteria


def spread(values: np.ndarray) -> float:
    """The standard deviation as the median absolute deviation tells it."""
    if not len(values):
        return 0.0
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def pieces(
    values: np.ndarray, count: int = criteria.PIECES, quantile: float = 0.5
) -> np.ndarray:
    """Quantiles of nearly equal pieces, at most so many; 0 where there is nothing."""
    if not len(values):
        return np.zeros(1)
    cut = np.array_split(values, _few(values, count))
    if quantile == 0.5:
        return np.array([np.median(x) for x in cut])  # in half the time
    return np.array([np.quantile(x, quantile) for x in cut])


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


def margin(above: np.ndarray, least: float, false: float) -> float:
    """How far above the level chance does not reach, but for so many times a run.

    Through two quantiles goes an exponential tail, and one that bends: a Weibull tail
    of the numbers whose logarithms these are. Tails of real norms end between the two.
    """
    low, high = np.quantile(above, criteria.TAIL)
    part, near = (1 - quantile for quantile in criteria.TAIL)
    rare = min(near, false / len(above))
    straight = np.log(part / rare) / np.log(part / near)
    bent = np.log(np.log(rare) / np.log(part)) / np.log(np.log(near) / np.log(part))
    tail = low + (high - low) * (straight + bent) / 2
    return max(least, min(float(tail), criteria.MOST_DEVIATIONS * spread(above)))


def margins(above: np.ndarray, least: float, false: float) -> np.ndarray:
    """The same for each step: by the noise of the run, or by that around the step.

    Noise may grow tenfold while a run learns. What is far outside the noise around it
    is a spike, also where norms vary as much elsewhere.
    """
    whole = margin(above, least, false)
    width = _width(above, criteria.NOISE_STEPS)
    if not np.ptp(width):
        return np.full(len(above), whole)
    around_it = margin(above / width, 0.0, false) * width
    return np.maximum(least, np.minimum(whole, around_it))


def _width(above: np.ndarray, each: int) -> np.ndarray:
    """How far the upper fifth is above the level around each step."""
    each = min(each, len(above))
    count = len(above) // each
    parts = above[: count * each].reshape(count, each)
    wide = np.quantile(parts, criteria.TAIL[0], axis=1) - np.median(parts, axis=1)
    usual = float(np.quantile(above, criteria.TAIL[0]) - np.median(above))
    wide = np.maximum(wide, max(criteria.NOISE_LEAST * usual, 1e-9))
    return np.interp(np.arange(len(above)), (np.arange(count) + 0.5) * each, wide)


def peaks(
    values: np.ndarray, least: float, false: float = criteria.FALSE_SPIKES
) -> tuple[np.ndarray, np.ndarray]:
    """Where values are above the levels before and after, and by how much."""
    above = residuals(values)
    enough = margins(above, least, false)
    at = np.flatnonzero(above > 0.5 * enough)
    before, after = around(values, at)
    high = values[at] - np.maximum(before, after)
    chosen = high > enough[at]  # false for NaN
    return _highest_of_each(at[chosen], high[chosen])


def _highest_of_each(at: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first step of each group of neighbours, with its greatest height."""
    if not len(at):
        return at, high
    starts = np.flatnonzero(np.append(True, np.diff(at) > criteria.SPIKE_GAP))
    return at[starts], np.maximum.reduceat(high, starts)


def folded(above: np.ndarray) -> np.ndarray | None:
    """Places at equal distances that are higher together than by chance; or none.

    Each step scores the negative logarithm of its rank as a fraction. By chance, the
    sum of the scores of m places has a gamma distribution, whose tail at s is at most
    exp(-(s - m - m log(s / m))). Distances between the highest steps, and their halves
    and thirds, are tried as periods; the bound is for all periods and phases.
    """
    count = len(above)
    order = np.argsort(-above / _width(above, criteria.NOISE_STEPS), kind="stable")
    scores = np.empty(count)
    scores[order] = -np.log(np.arange(1, count + 1) / (count + 1))
    first = order[order < criteria.FOLDED_STEPS][: criteria.FOLDED_PEAKS]
    tried = np.log(max(1.0, count / 4) ** 2 / 2)
    best, places = tried - np.log(criteria.FOLDED_FALSE), None
    for start, period in _distances(np.sort(first)):
        some = np.round(np.arange(start, count - 0.5, period)).astype(int)
        total, chance = scores[some].sum(), len(some)
        if chance < criteria.PERIODIC_LEAST or total <= chance:
            continue
        beyond = total - chance - chance * np.log(total / chance)
        if beyond > best:
            best, places = beyond, some
    return places


def _distances(places: np.ndarray) -> list[tuple[int, float]]:
    """Where spikes at equal distances may start, and the distances."""
    pairs = [(a, b - a) for a, b in itertools.combinations(places.tolist(), 2)]
    all_of_them = [(a, gap / parts) for a, gap in pairs for parts in (1, 2, 3)]
    return [(a, x) for a, x in all_of_them if x >= 2 * criteria.SPIKE_GAP]


def rises(values: np.ndarray, least: float) -> np.ndarray:
    """Where values go above the level before them, whether or not they come back."""
    enough = margin(residuals(values), least, criteria.FALSE_RISES)
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
    around_it = np.lib.stride_tricks.sliding_window_view(
        np.pad(size, side), 2 * side + 1
    )
    found = {}
    early = max(criteria.SHIFT_SIDE, criteria.SHIFT_EARLY * len(values))
    for k in np.flatnonzero((size > criteria.SHIFT) & (size == around_it.max(axis=1))):
        if settled[k]:
            far = settled.copy()
            far[max(0, k - 2 * side + 1) : k + 2 * side] = False
            others = float(size[far].max(initial=0.0))
            least = min(
                criteria.SHIFT_DEVIATIONS * noise, criteria.SHIFT_OTHERS * others
            )
        else:
            others, least = np.inf, criteria.SHIFT_EARLY_DEVIATIONS * noise
        if size[k] <= least:
            continue
        alone = size[k] > criteria.SHIFT_ALONE * others
        rank = criteria.SHIFT_RANK_ALONE if alone else criteria.SHIFT_RANK
        place = split(values, int(k) * each, (int(k) + 2 * side) * each)
        if place >= early and _is_sharp(values, place, float(change[k]), rank):
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


def _is_sharp(values: np.ndarray, place: int, change: float, rank: float) -> bool:
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
        and pairs.mean() >= rank
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
