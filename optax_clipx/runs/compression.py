"""Norms that `auto_clip` has compressed: it makes most steps shorter by design."""

import numpy as np

from .table import STEP, Columns, present

_UNITS = 8.0  # in a threshold; auto_clip leaves norms below one of them as they are
_FEWEST = 10  # steps that show how norms were clipped
_CLOSE = 1e-3  # of a clipped norm
# How auto_clip's thresholds rise in the first steps, from when on their unit is known.
_START, _STEPS, _FIRST = 0.3, 100, 10
_SAME = 2e-5  # of a threshold: logs may be rounded to six digits
_REPEATED = 0.75  # as many thresholds as steps, or fewer, come from a few leaves
_AGREE = 0.99  # of the steps


def is_compressed(columns: Columns, norm: str) -> bool:
    """Whether the norms beside a column were compressed, not held at a threshold."""
    if not norm.endswith("norm"):
        return False
    start = norm.removesuffix("norm")
    return _as_a_whole(columns, start) or _by_parts(columns, start)


def _as_a_whole(columns: Columns, start: str) -> bool:
    """Whether the norm of the whole gradient was compressed."""
    values = _values(columns, start, "norm", "threshold", "clipped_norm")
    if values is None:
        return False
    norms, limits, clipped = values
    # Where it differs from a norm that stays as it is, and from the threshold.
    shorter = (norms > limits / 4) & (norms < 100 * limits)
    if shorter.sum() < _FEWEST:
        return False
    expected = limits[shorter] * _compressed(norms[shorter] / limits[shorter])
    off = np.abs(clipped[shorter] - expected)
    return bool(np.median(off / expected) < _CLOSE)


def _by_parts(columns: Columns, start: str) -> bool:
    """Whether the norms of leaves or units were, each with a threshold of its own.

    The columns have the threshold and the scale of the part that was scaled down most.
    So a part is above its threshold where this scale is at most that of a norm at the
    threshold. In the first steps, all thresholds rise in the same way: divided by that
    rise, they are a few numbers, one for each part.
    """
    count = "steps" if f"{start}steps" in columns else None
    values = _values(columns, start, "threshold", "scale", "clipped", count)
    if values is None:
        return False
    limits, scales, clipped, steps = values
    highest = _compressed(np.ones(1))  # the scale at the threshold
    told = (scales < 1) & (np.abs(scales / highest - 1) > _CLOSE)
    agree = (clipped > 0) == (scales < highest)
    if told.sum() < _FEWEST or agree[told].mean() < _AGREE:
        return False
    early = (steps > _FIRST) & (steps < _STEPS)
    if early.sum() < _FEWEST:
        return False
    rise = _START + (1 - _START) * steps[early] / _STEPS
    units = np.sort(np.log(limits[early] / rise))
    different = 1 + np.sum(np.diff(units) > _SAME)
    return bool(different <= _REPEATED * len(units))


def _compressed(norms: np.ndarray) -> np.ndarray:
    """What becomes of norms above an eighth of the threshold, all divided by it."""
    return np.minimum(1 + np.log(_UNITS * norms), _UNITS) / _UNITS


def _values(
    columns: Columns, start: str, *names: str | None
) -> list[np.ndarray] | None:
    """Columns where all of them are finite, and the threshold is above zero.

    Without a column that counts the steps, the numbers of the steps count them.
    """
    full = [STEP if name is None else f"{start}{name}" for name in names]
    if any(name not in columns for name in full):
        return None
    values = [np.asarray(columns[name], np.float64) for name in full]
    if STEP in full:
        values[full.index(STEP)] = values[full.index(STEP)] + 1
    known = np.all([present(x) & np.isfinite(x) for x in values], axis=0)
    known &= values[full.index(f"{start}threshold")] > 0
    return [x[known] for x in values]
