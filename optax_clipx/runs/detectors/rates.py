"""How often a run was clipped, against what its rule is to clip."""

from typing import Any

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..levels import margins, piece_starts, residuals
from ..signals import Line, Signals


def always(run: Signals) -> list[Finding]:
    """Runs of which nearly every step is clipped, up to their end."""
    assert run.clipped is not None
    clipped = run.sound(run.clipped)
    flags, steps = clipped.values, clipped.steps
    least = criteria.ALWAYS
    if run.target is not None:
        least = max(least, 1 - criteria.PASS_PART * (1 - run.target))
    if len(flags) < criteria.LEAST_STEPS or run.target == 1 or run.compressed:
        return []
    parts = np.add.reduceat(flags, piece_starts(len(flags)))
    sizes = np.diff([*piece_starts(len(flags)), len(flags)])
    # From each piece to the end; the longest such stretch.
    rates = np.cumsum(parts[::-1])[::-1] / np.cumsum(sizes[::-1])[::-1]
    high = np.flatnonzero((rates >= least) & (parts >= 0.8 * sizes))
    if not len(high):
        return []
    start = piece_starts(len(flags))[high[0]]
    if len(flags) - start < criteria.ALWAYS_STRETCH * len(flags):
        return []
    evidence: dict[str, Any] = {"clip_rate": float(rates[high[0]])}
    if run.target is not None:
        evidence["target"] = run.target
    if run.norm is not None and run.threshold is not None:
        evidence["threshold"] = float(np.median(run.threshold.values[start:]))
        evidence["median_norm"] = float(np.median(run.norm.values[start:]))
        evidence["column"] = run.norm.name
    return [finding("always-clipped", "warning", [steps[start], steps[-1]], **evidence)]


def never(run: Signals) -> list[Finding]:
    """Runs of which no step is clipped."""
    assert run.norm is not None
    assert run.threshold is not None
    assert run.clipped is not None
    norm = run.norm.finite()
    known = run.threshold.values[np.isfinite(run.threshold.values)]
    clipped = run.sound(run.clipped)
    few = len(clipped.values) < criteria.NEVER_STEPS or not len(known)
    if few or not len(norm.values) or clipped.values.any():
        return []
    high, limit = float(np.quantile(norm.values, 0.99)), float(np.median(known))
    far = limit > criteria.NEVER_FAR * high
    return [
        finding(
            "never-clipped",
            "warning" if far or run.target else "info",
            [clipped.steps[0], clipped.steps[-1]],
            threshold=limit,
            **{"high_norm": high, "closest": _closest(run.norm, run.threshold)},
            **({} if run.target is None else {"target": run.target}),
            column=norm.name,
        )
    ]


def _closest(norm: Line, threshold: Line) -> float:
    """The largest norm as a fraction of the threshold of its step."""
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = norm.values / threshold.values
    return float(parts[np.isfinite(parts)].max(initial=0.0))


def warmup(run: Signals) -> list[Finding]:
    """A spike at the start after which an adaptive threshold lets pass everything."""
    assert run.norm is not None
    assert run.threshold is not None
    keep = np.isfinite(run.norm.values) & (run.norm.values > 0)
    steps, norms = run.norm.steps[keep], run.norm.values[keep]
    limits = run.threshold.values[keep]
    count = len(norms)
    if count < 2 * criteria.LEAST_STEPS or _is_fixed(limits):
        return []
    early = min(criteria.WARMUP_STEPS, int(criteria.WARMUP_PART * count))
    at = int(norms[:early].argmax())
    near = max(criteria.WARMUP_STEPS, int(criteria.BLIND_PART * count))
    level = float(np.median(norms[at + 1 : at + 1 + near]))
    next_to_it = float(np.median(norms[at + 1 : at + 1 + criteria.WARMUP_ALONE]))
    limits = limits[at + 1 :]
    limits = limits[np.isfinite(limits)]  # rules have none while they warm up
    is_spike = norms[at] >= next_to_it * np.exp(criteria.SPIKE)
    is_high = norms[at] >= level * np.exp(criteria.WARMUP_SPIKE)
    if not (is_spike and is_high and len(limits)):
        return []
    above = residuals(np.log(norms))
    if above[at] < margins(above, 0.0, criteria.FALSE_WARMUP)[at]:
        return []  # norms of this run are as high by chance
    later = limits > criteria.BLIND * level
    blind = int(later.argmin()) if not later.all() else len(later)
    if blind < max(criteria.BLIND_STEPS, criteria.BLIND_PART * count):
        return []
    return [
        finding(
            "warmup-spike",
            "warning",
            [steps[at]],
            norm=float(norms[at]),
            **{"later_norms": level, "blind_steps": blind},
            threshold=float(np.median(limits[:blind])),
            column=run.norm.name,
        )
    ]


def _is_fixed(limits: np.ndarray) -> bool:
    known = limits[np.isfinite(limits)]
    return not len(known) or bool(np.ptp(known) == 0)
