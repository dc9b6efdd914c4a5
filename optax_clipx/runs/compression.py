"""Norms that `auto_clip` has compressed: it makes most steps shorter by design."""

import numpy as np

from .table import Columns, present

_UNITS = 8.0  # in a threshold; auto_clip leaves norms below one of them as they are
_FEWEST = 10  # steps that show how norms were clipped
_CLOSE = 1e-3  # of a clipped norm


def is_compressed(columns: Columns, norm: str) -> bool:
    """Whether the norms beside a column were compressed, not held at a threshold."""
    start = norm.removesuffix("norm")
    beside = (f"{start}threshold", f"{start}clipped_norm")
    if not norm.endswith("norm") or any(name not in columns for name in beside):
        return False
    norms, limits, clipped = (
        np.asarray(columns[name], np.float64) for name in (norm, *beside)
    )
    known = present(norms) & present(limits) & present(clipped)
    known &= np.isfinite(norms) & np.isfinite(limits) & (limits > 0)
    norms, limits, clipped = norms[known], limits[known], clipped[known]
    # Where it differs from a norm that stays as it is, and from the threshold.
    shorter = (norms > limits / 4) & (norms < 100 * limits)
    if shorter.sum() < _FEWEST:
        return False
    units = _UNITS * norms[shorter] / limits[shorter]
    expected = limits[shorter] / _UNITS * np.minimum(1 + np.log(units), _UNITS)
    off = np.abs(clipped[shorter] - expected)
    return bool(np.median(off / expected) < _CLOSE)
