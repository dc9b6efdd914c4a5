"""Whether the newest steps of a run are bad, judged by recorded numbers alone."""

import math
from typing import NamedTuple

import numpy as np

from .levels import spread
from .table import STEP, Columns, present

SKIPPED = "skip/skipped"
NONFINITE = "clip/nonfinite"
REASONS = ("nonfinite", "loss", "skipped")

_FEWEST = 20  # losses: with fewer there is no limit yet
_SMALLEST_RISE = 0.1  # of a loss; less is bad at no distance from the others


class BadStretch(NamedTuple):
    """The bad steps that a run ends with.

    Attributes:
        onset: the first of them.
        reason: what is wrong with the last of them, one of ``REASONS``.
        loss: the last loss; ``None`` if none was recorded.
        limit: above which a loss is bad; ``None`` while there were too few losses.
    """

    onset: int
    reason: str
    loss: float | None
    limit: float | None


def bad_stretch(
    rows: Columns, loss: str, patience: int, band: float
) -> BadStretch | None:
    """The bad steps at the end of some rows, if they are at least ``patience``.

    Args:
        rows: the newest records; the limit comes from those before the last
            ``patience``, so that a divergence does not hide itself.
        loss: the column of the losses.
        patience: how many bad steps in a row count.
        band: how many robust standard deviations above the median are usual.
    """
    told = present(rows[loss]) | present(rows[SKIPPED])
    steps, losses, skipped, flags = (
        rows[name][told] for name in (STEP, loss, SKIPPED, NONFINITE)
    )
    if len(steps) < patience:
        return None
    limit = _limit(losses[:-patience], band)
    nonfinite = (present(losses) & ~np.isfinite(losses)) | (flags > 0)
    bad = nonfinite | (losses > limit) | (skipped > 0)
    good = np.flatnonzero(~bad)
    first = int(good[-1]) + 1 if len(good) else 0
    if len(bad) - first < patience:
        return None
    causes = (nonfinite[-1], losses[-1] > limit, True)
    return BadStretch(
        onset=int(steps[first]),
        reason=next(r for r, c in zip(REASONS, causes, strict=True) if c),
        loss=float(losses[-1]) if present(losses[-1:])[0] else None,
        limit=limit if math.isfinite(limit) else None,
    )


def _limit(losses: np.ndarray, band: float) -> float:
    """Median + max(band * robust standard deviation, a tenth of the median)."""
    usual = losses[np.isfinite(losses)]  # what is missing is a NaN, too
    if len(usual) < _FEWEST:
        return math.inf
    with np.errstate(over="ignore"):
        middle = np.median(usual)
        return float(middle + max(band * spread(usual), _SMALLEST_RISE * abs(middle)))
