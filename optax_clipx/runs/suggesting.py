"""`suggest_threshold`: a threshold from the norms of a run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import naming, readers
from .compression import is_compressed
from .merging import NO_RESTARTS
from .rate_jumps import jump
from .signals import Line, Names, Signals
from .suggestion import FEWEST, Suggestion, explained
from .table import STEP, Columns, present
from .trouble import Trouble, trouble
from .upper_bound import told, upper_bound, usual_norm

_PIECES = 40  # into which a run is cut to see where its warm-up ends
_MANY = 0.01
_NEARLY_ALL = 0.95  # of the steps clipped: the threshold alone set how long they were
_WINDOW = 5  # norms in the median that is followed back to where an explosion begins
_GROWN = 3  # times the level before: what is above is part of the explosion
_EXPLODED = 1000  # times the median: norms that end there were not recorded to the end


class Recorded(NamedTuple):
    """The columns of a run, and the name of the one with its norms."""

    columns: Columns
    norm: str


def suggest_threshold(
    norms: Any, clip_rate: float | int = 0.1, *, limit: Any = None
) -> Suggestion:
    r"""Suggests the threshold that would have clipped a given fraction of the steps.

    .. math:: t = \mathrm{quantile}_{1 - r}\{n_k : k > \text{warm-up}\}

    Here :math:`n_k` is the norm at step :math:`k`, and :math:`r` is ``clip_rate``.

    - **Warm-up**: the first steps are left out if their norms are much larger or much
      smaller than the later norms.
    - **Non-finite norms**: an infinite or NaN norm counts as a clipped step, whatever
      the threshold is.
    - **Spikes**: spikes are norms far above the others. They do not raise the
      threshold. If more than the fraction :math:`r` of the norms are spikes, the
      threshold is the quantile of the other norms.
    - **Falling norms**: if the norms fall during the run, one threshold clips fewer
      steps at the end than at the start. The threshold is then the quantile of the last
      third of the run.
    - **Explosions**: if training exploded, only the norms before the explosion are
      used. If the record of the run has the loss, and the loss diverged, only the norms
      before the step that :func:`diagnose` names are used. If there are fewer than 20
      such norms, no threshold is suggested, and ``value`` is NaN.
    - **Runs that were nearly always clipped**: if more than 95% of the steps of a run
      were clipped, the run says nothing about higher thresholds. A higher threshold
      would have given longer steps, and then other norms. The suggestion is at most the
      threshold of that run.

    This function compares no losses. :func:`find_threshold` trains with several
    thresholds and compares the results.

    Args:
        norms: the gradient norms before clipping, in the order of the steps. You can
            also pass a :class:`History` or the path of a recorded run.
        clip_rate: :math:`r`, the fraction of steps to clip.
        limit: the threshold with which the run was clipped. It is a number, or an array
            with one number for each step, or ``None`` if the run was not clipped. You
            do not need it for a :class:`History` that has recorded the threshold.

    Returns:
        A :class:`Suggestion`. It has the threshold ``value``, the clip rate of this
        threshold on this run, and the clip rate in each tenth of the run. If the norms
        rise or fall during the run, it also has a ``warning`` and an adaptive ``rule``.

    Raises:
        ValueError: if ``clip_rate`` is not between 0 and 1, if no norm is positive and
            finite, if a norm is negative, if ``limit`` is negative, or if ``limit`` and
            ``norms`` have different lengths.

    Example:
        >>> import numpy as np
        >>> import optax_clipx as clipx
        >>> norms = np.random.default_rng(0).lognormal(size=1000)
        >>> found = clipx.suggest_threshold(norms)
        >>> print(f"{found.value:.2f} {found.clip_rate:.0%}")
        3.42 10%

    References:
        Seetharaman et al., AutoClip, 2020, arXiv 2007.14469, use a quantile of the
        norms as the threshold. Pascanu et al., 2013, arXiv 1211.5063, choose the
        threshold from the average norm.
    """
    if not 0 < clip_rate < 1:
        raise ValueError(f"Expected 0 < clip_rate < 1, got clip_rate={clip_rate}.")
    run = _read(norms, limit)
    nonfinite = int(np.sum(~np.isfinite(run.norms)))
    # A norm of zero says nothing of the level; one that overflowed is above any
    # threshold.
    values = np.where(np.isnan(run.norms), np.inf, run.norms)
    positive = values > 0
    used, limits, steps = values[positive], run.limits[positive], run.steps[positive]
    if not np.isfinite(used).any():
        raise ValueError(
            f"Expected positive finite norms, got none among {len(values)}. Record a"
            " run with a threshold, or with a lower learning rate."
        )
    signals = Signals(run.columns, Names(norm=run.name), NO_RESTARTS)
    found = trouble(signals)
    kept, exploded = _healthy(used, steps, found)
    before = found.begins
    if before is None and len(kept) < len(used):
        before = int(steps[len(kept)])
    end = np.inf if before is None else before
    usual = usual_norm(signals.norm, "the usual norm", end)
    said: dict[str, Any] = {
        "nonfinite": nonfinite,
        "asked": float(clip_rate),
        "exploded": exploded,
        "diverged": found.diverged,
        "seen": found.said,
        "doubt": found.doubt,
        "max_norm": np.nan if usual is None else upper_bound(usual.norm),
        "max_norm_from": "" if usual is None else told(usual),
    }
    if len(kept) < len(used):
        near = (int(steps[len(kept)]), found.rises)
        said["first"] = _first(signals.schedule, [x for x in near if x is not None])
        if len(kept) < FEWEST:
            return explained(_none(said), len(kept))
    skipped = _warmup(kept)
    warmup = int(np.flatnonzero(positive)[skipped]) if skipped else 0
    limits = limits[skipped : len(kept)]
    fitted = _fitted(kept[skipped:], limits, clip_rate)
    of_all = float(np.mean(kept > fitted["value"]))
    suggestion = Suggestion(**fitted, **said, warmup=warmup, of_all=of_all)
    return explained(suggestion, len(kept) - skipped)


def _healthy(
    norms: np.ndarray, steps: np.ndarray, found: Trouble
) -> tuple[np.ndarray, bool]:
    """The norms before training went wrong, and whether they show that it exploded."""
    kept = _before_explosion(norms)
    exploded = len(kept) < len(norms)
    if found.diverged is not None:
        kept = kept[steps[: len(kept)] < found.diverged]
    return kept, exploded


def _fitted(
    steady: np.ndarray, limits: np.ndarray, clip_rate: float | int
) -> dict[str, Any]:
    """The threshold of the steps after the warm-up, and what it does to them."""
    cutoff = _spike_level(steady[np.isfinite(steady)])
    recorded = _recorded(steady, limits)
    ceiling = np.inf if recorded is None else recorded
    value = min(_limit(steady, cutoff, clip_rate), ceiling)
    drift, drifting = _drift(steady, value, clip_rate)
    late = _cut(steady, 3)[-1]
    if drifting and drift < 1:
        # A threshold for the high norms of the start would let pass what is a spike
        # later, and too low a threshold does less harm than too high a one.
        value = min(_limit(late, cutoff, clip_rate), ceiling)
    return {
        "value": value,
        "clip_rate": float(np.mean(steady > value)),
        "rates": tuple(float(np.mean(part > value)) for part in _cut(steady, 10)),
        "late_rate": float(np.mean(late > value)),
        "drift": drift,
        "spikes": float(np.mean(steady > cutoff)),
        "recorded": recorded,
        "rule": _rule(1 - clip_rate, value, steady, drift) if drifting else None,
        "clipped": _clipped(steady, limits),
    }


def _none(said: dict[str, Any]) -> Suggestion:
    """What is said of a run that exploded before its usual norm could be seen."""
    return Suggestion(
        value=np.nan,
        clip_rate=np.nan,
        rates=(),
        drift=1.0,
        warmup=0,
        spikes=0.0,
        recorded=None,
        rule=None,
        of_all=np.nan,
        **said,
    )


def _first(rate: Line | None, near: Sequence[int]) -> str:
    """What to change about the learning rate of a run that failed near some steps."""
    unknown = "use a lower learning rate, for example a third of the present one"
    if rate is None:
        return unknown
    found = (jump(rate.steps, rate.values, step) for step in near)
    jumped = next((x for x in found if x is not None), None)
    if jumped is not None:
        return (
            f"go back to a learning rate of {jumped.before:.4g}: at step"
            f" {jumped.step:,} the learning rate rose to {jumped.after:.4g}, and then"
            " training failed"
        )
    high = float(rate.values[rate.steps <= near[0]].max(initial=0.0))
    if not (np.isfinite(high) and high > 0):
        return unknown
    return (
        f"use a lower learning rate, for example {high / 3:.2g}, which is a third of"
        f" {high:.4g}"
    )


class _Run(NamedTuple):
    """The norms that were recorded, and the columns that they are from.

    The threshold is infinite if there was none, and NaN where it was not recorded.
    """

    norms: np.ndarray
    limits: np.ndarray
    steps: np.ndarray
    columns: Columns
    name: str


def _read(norms: Any, limit: Any) -> _Run:
    of_run = isinstance(norms, str) or hasattr(norms, "__fspath__")
    if of_run or hasattr(norms, "steps"):
        columns = naming.with_whole_norm(readers.columns_of_run(norms))
        name = naming.pick(columns, "norm", None, norms if of_run else norms.path)
        norms = Recorded(columns, name)
    if isinstance(norms, Recorded):
        columns, name = norms
        values = naming.norms_of_all_steps(columns, name)
        if limit is None and not is_compressed(columns, name):
            limit = naming.limits_beside(columns, name)
    else:
        values, name = np.asarray(norms, np.float64), "norm"
        columns = {STEP: np.arange(values.size), name: values}
    _check(values)
    limits = np.asarray(np.inf if limit is None else limit, np.float64)
    if limits.ndim and limits.shape != values.shape:
        raise ValueError(
            f"Expected one limit, or one for each of the {len(values)} norms, got"
            f" limit of shape {limits.shape}."
        )
    if np.any(limits < 0):
        raise ValueError(f"Expected limit >= 0, got {np.nanmin(limits):g}.")
    there = present(values)
    limits = np.broadcast_to(limits, values.shape)[there]
    return _Run(values[there], limits, columns[STEP][there], columns, name)


def _check(norms: np.ndarray) -> None:
    if norms.ndim != 1:
        raise ValueError(
            f"Expected the norms of one run, one a step, got shape {norms.shape}."
            " Of several seeds, suggest for each: suggest_threshold(norms[:, 0])."
        )
    if np.any(norms < 0):
        raise ValueError(
            f"Expected norms >= 0, got {norms[norms < 0][0]:g} at index"
            f" {int(np.argmax(norms < 0))}. Is this another column?"
        )


def _clipped(norms: np.ndarray, limits: np.ndarray) -> float:
    """The fraction of these steps that were clipped when they were recorded."""
    known = ~np.isnan(limits)
    return float(np.mean(norms[known] > limits[known])) if known.any() else 0.0


def _recorded(norms: np.ndarray, limits: np.ndarray) -> float | None:
    """The usual threshold of a run of which nearly every step was clipped."""
    if _clipped(norms, limits) <= _NEARLY_ALL:
        return None
    limits = limits[~np.isnan(limits)]
    return float(np.median(limits[limits > 0])) if np.any(limits > 0) else None


def _before_explosion(norms: np.ndarray) -> np.ndarray:
    """The norms of a run that exploded up to where they grow; else all of them."""
    end = _breaks_at(norms)
    before = norms[:end]
    usual = before[np.isfinite(before)]
    last = usual[-max(1, len(usual) // 20) :]
    if end == len(norms) and _median(last) <= _EXPLODED * _median(usual):
        return norms
    if len(before) < _WINDOW:
        return before[:0]
    windows = np.lib.stride_tricks.sliding_window_view(before, _WINDOW)
    levels = np.sort(windows)[:, _WINDOW // 2]
    # Looked at is a stretch twice as long as the growth, so that half of it is before.
    stretch = max(FEWEST, len(levels) // 3)
    while True:
        low = float(levels[-stretch:].min())
        kept = int(np.flatnonzero(levels <= _GROWN * low)[-1]) + 1
        grown = len(levels) - kept
        if stretch >= min(2 * grown, len(levels)):
            return before[: kept + _WINDOW // 2]
        stretch = 2 * grown


def _breaks_at(norms: np.ndarray) -> int:
    """Where the norms stop being finite for good; their number if they do not."""
    lost = ~np.isfinite(norms)
    after = np.cumsum(lost[::-1])[::-1]
    lasting = lost & (after > _MANY * len(norms))
    lasting &= 2 * after > np.arange(len(norms), 0, -1)
    return int(np.argmax(lasting)) if lasting.any() else len(norms)


def _warmup(norms: np.ndarray) -> int:
    """How many norms at the start have another level than the second half."""
    pieces = _cut(norms, min(_PIECES, len(norms) // 5))
    if len(pieces) < 10:
        return 0
    levels = np.log([_median(piece) for piece in pieces])
    later = levels[len(levels) // 2 :]
    if not np.isfinite(later).all():  # the run did not settle
        return 0
    far = ~np.isfinite(levels)
    far |= np.abs(levels - np.median(later)) > max(3 * _deviation(later), np.log(1.5))
    ends = int(np.argmin(far))
    # What has not settled after a quarter of the run is no warm-up.
    return sum(map(len, pieces[:ends])) if ends <= len(pieces) // 4 else 0


def _spike_level(norms: np.ndarray) -> float:
    """Above this a norm is no part of the usual spread."""
    logs = np.log(norms)
    level = np.median(logs) + max(5 * _deviation(logs), np.log(4))
    with np.errstate(over="ignore"):  # infinity: there are no spikes
        return float(min(np.exp(level), norms.max()))


def _limit(norms: np.ndarray, cutoff: float, clip_rate: float | int) -> float:
    """The quantile; that of the norms which are no spikes, if it is one itself."""
    value = np.quantile(norms, 1 - clip_rate, method="inverted_cdf")
    if value > cutoff or not np.isfinite(value):
        below = norms[norms <= cutoff]
        value = np.quantile(below, 1 - clip_rate, method="inverted_cdf")
    return float(value)


def _drift(norms: np.ndarray, value: float, clip_rate: float) -> tuple[float, bool]:
    """How much the level changed, and whether one threshold misses a part of it."""
    thirds = _cut(norms, 3)
    if len(thirds) < 3:
        return 1.0, False
    levels = [_median(third) for third in thirds]
    if not np.isfinite(levels).all():
        return 1.0, False
    rates = [float(np.mean(third > value)) for third in thirds]
    least = max(min(rates), clip_rate / 10)
    by_chance = 3 * np.sqrt(2 * clip_rate * (1 - clip_rate) / len(thirds[0]))
    moved = max(levels) > 1.25 * min(levels)
    uneven = max(rates) > 3 * least and max(rates) - min(rates) > by_chance
    return levels[-1] / levels[0], bool(moved and uneven)


def _rule(quantile: float, value: float, norms: np.ndarray, drift: float) -> str:
    # Norms that fell are followed down, and never up beyond the threshold; norms that
    # rose are followed up to a few times the usual norm: where clipping is what keeps
    # them low, a rule that follows them without a bound lets training explode.
    most = value if drift < 1 else upper_bound(_median(_cut(norms, 3)[-1]))
    bound = f"max_norm={most:.4g}"
    return f'optax_clipx.quantile_clip({quantile:.4g}, estimator="tracker", {bound})'


def _median(norms: np.ndarray) -> float:
    """The median of what is finite; infinity where nothing is."""
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        return np.inf
    with np.errstate(over="ignore"):  # the mean of two huge numbers
        return min(float(np.median(finite)), float(finite.max()))


def _deviation(values: np.ndarray) -> float:
    """The standard deviation as the median absolute deviation tells it."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def _cut(values: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Pieces of nearly one length, none empty."""
    return np.array_split(values, max(1, min(pieces, len(values))))
