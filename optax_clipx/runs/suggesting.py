"""`suggest_threshold`: a threshold from the norms of a run."""

from typing import Any, NamedTuple

import numpy as np

from . import naming, readers
from .compression import is_compressed
from .jsonl import ReadError
from .rate_jumps import jump
from .table import STEP, Columns, present

_PIECES = 40  # into which a run is cut to see where its warm-up ends
_FEW = 100
_TRACKER_RATE = 0.02  # the default learning_rate of thresholds.quantile_tracker
_TIMES = 3  # the usual norm, as the bound of a rule that follows rising norms
_MANY = 0.01
_MOST = 0.5  # of the steps clipped: their threshold was chosen on purpose
_NEARLY_ALL = 0.95  # of the steps clipped: the threshold alone set how long they were
_WINDOW = 5  # norms in the median that is followed back to where an explosion begins
_GROWN = 3  # times the level before: what is above is part of the explosion
_EXPLODED = 1000  # times the median: norms that end there were not recorded to the end
_FEWEST = 20  # norms before an explosion; with fewer no threshold is suggested


class _Rate(NamedTuple):
    """Learning rates with their steps, and the step of each norm."""

    steps: np.ndarray
    values: np.ndarray
    of_norms: np.ndarray


class Recorded(NamedTuple):
    """The columns of a run, and the name of the one with its norms."""

    columns: Columns
    norm: str


class Suggestion(NamedTuple):
    """A suggested threshold, and its clip rate on the recorded run.

    If training exploded, all numbers describe the steps before the norms grew.

    Attributes:
        value: the threshold. It is NaN if training exploded too early to suggest a
            threshold.
        clip_rate: the fraction of steps after the warm-up whose norm was above
            ``value``.
        rates: the clip rate of ``value`` in each tenth of the steps after the warm-up.
        drift: the median norm in the last third of these steps, divided by the median
            norm in the first third.
        warmup: the number of steps at the start that were left out as warm-up.
        spikes: the fraction of steps whose norm is far above the others.
        nonfinite: how many norms of the whole run were infinite or NaN.
        recorded: the threshold with which the run was clipped, if more than 95% of the
            steps were clipped. Otherwise it is ``None``.
        warning: why a fixed threshold may be wrong for this run. It is empty if there
            is no reason.
        rule: an adaptive rule to use instead of a fixed threshold, as code. It is
            ``None`` if a fixed threshold is enough.
        asked: the fraction of steps to clip that you asked for.
        why: why ``clip_rate`` differs from ``asked``. It is empty if they are equal.
        exploded: whether training exploded: the norms end as infinity or NaN, or end
            more than 1,000 times above their median.
        first: what to change about the learning rate first, if training exploded.
        clipped: the fraction of steps that were clipped when the run was recorded.
        of_all: the fraction of steps whose norm was above ``value``, with the warm-up.
    """

    value: float
    clip_rate: float
    rates: tuple[float, ...]
    drift: float
    warmup: int
    spikes: float
    nonfinite: int
    recorded: float | None
    warning: str
    rule: str | None
    asked: float = 0.1
    why: str = ""
    exploded: bool = False
    first: str = ""
    clipped: float = 0.0
    of_all: float = 0.0

    def __str__(self) -> str:
        lines = self._use()
        known = not np.isnan(self.value) and self.recorded != self.value
        if known:
            lines += self._rates()
        if known and self.why:
            lines.append(f"why not {_percent(self.asked)}: {self.why}")
        if self.warmup:
            warmup = naming.counted(self.warmup, "norm")
            lines.append(f"left out as warm-up: {warmup} at the start")
        if self.nonfinite:
            lines.append(f"non-finite: {naming.counted(self.nonfinite, 'norm')}")
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines + self._alternatives())

    def _use(self) -> list[str]:
        """What to do."""
        clipper = f"use {self._clipper()}"
        if self.exploded:
            then = f"{clipper} as a second protection"
            if np.isnan(self.value):
                then = "record the norms again with optax_clipx.auto_clip()"
            return [f"first {self.first}", f"then {then}"]
        if self.recorded == self.value:
            return [
                "record another run first, with optax_clipx.zclip() or with a much"
                f" higher threshold, such as {10 * self.value:.4g}"
            ]
        return [clipper]

    def _clipper(self) -> str:
        """The recommended clipping, as code."""
        return self.rule if self._rises() and self.rule else self._fixed()

    def _fixed(self) -> str:
        return f"optax_clipx.clip_by_global_norm({self.value:.4g})"

    def _rises(self) -> bool:
        return self.rule is not None and self.drift > 1

    def _rates(self) -> list[str]:
        """Which steps the threshold clips."""
        low, high = min(self.rates), max(self.rates)
        which, of_all, these = "the steps", "", "the run"
        if self.warmup:
            which, these = f"the steps after the first {self.warmup:,}", "these steps"
            of_all = f", and {self.of_all:.1%} of all steps"
        if self.exploded:
            which, these = f"{which} before the norms grew", "these steps"
            of_all += " before the norms grew" if of_all else ""
        it = f"a fixed threshold instead, {self._fixed()}," if self._rises() else "it"
        return [
            f"{it} would have clipped {self.clip_rate:.1%} of {which}{of_all}; the"
            f" goal is {_percent(self.asked)}",
            f"in ten equal parts of {these}, the lowest clip rate would have been"
            f" {low:.1%}, and the highest clip rate {high:.1%}",
        ]

    def _alternatives(self) -> list[str]:
        """What else to use where the norms change."""
        if not self.rule or self.exploded:
            return []
        sweep = "to compare thresholds by their loss, use optax_clipx.find_threshold"
        if self._rises():
            return [sweep]
        tracker = (
            f"if you train longer and the norms keep falling, use {self.rule}: its"
            f" threshold is at most {self.value:.4g} and falls by at most"
            f" {_percent(_TRACKER_RATE * self.asked)} in each step"
        )
        without = (
            "if you do not want to choose a threshold, use optax_clipx.auto_clip()"
        )
        return [tracker, *([without] if self.clipped <= _MOST else []), sweep]


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
      used. If there are fewer than 20 such norms, no threshold is suggested, and
      ``value`` is NaN.
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
    values, limits, rate = _norms(norms, limit)
    nonfinite = int(np.sum(~np.isfinite(values)))
    # A norm of zero says nothing of the level; one that overflowed is above any
    # threshold.
    values = np.where(np.isnan(values), np.inf, values)
    used, limits = values[values > 0], limits[values > 0]
    if not np.isfinite(used).any():
        raise ValueError(
            f"Expected positive finite norms, got none among {len(values)}. Record a"
            " run with a threshold, or with a lower learning rate."
        )
    kept = _before_explosion(used)
    exploded = len(kept) < len(used)
    if exploded and len(kept) < _FEWEST:
        none = _none(clip_rate, nonfinite, len(kept))
        return none._replace(first=_first(rate, values, len(kept)))
    skipped = _warmup(kept)
    steady = kept[skipped:]
    cutoff = _spike_level(steady[np.isfinite(steady)])
    recorded = _recorded(steady, limits[skipped : len(kept)])
    ceiling = np.inf if recorded is None else recorded
    value = min(_limit(steady, cutoff, clip_rate), ceiling)
    drift, drifting = _drift(steady, value, clip_rate)
    if drifting and drift < 1:
        # A threshold for the high norms of the start would let pass what is a spike
        # later, and too low a threshold does less harm than too high a one.
        value = min(_limit(_cut(steady, 3)[-1], cutoff, clip_rate), ceiling)
    found = Suggestion(
        value=value,
        clip_rate=float(np.mean(steady > value)),
        rates=tuple(float(np.mean(part > value)) for part in _cut(steady, 10)),
        drift=drift,
        warmup=int(np.flatnonzero(values > 0)[skipped]) if skipped else 0,
        spikes=float(np.mean(steady > cutoff)),
        nonfinite=nonfinite,
        recorded=recorded,
        warning="",
        rule=_rule(1 - clip_rate, value, steady, drift) if drifting else None,
        asked=float(clip_rate),
        exploded=exploded,
        first=_first(rate, values, len(kept)) if exploded else "",
        clipped=_clipped(steady, limits[skipped : len(kept)]),
        of_all=float(np.mean(kept > value)),
    )
    return found._replace(
        warning=_warning(found, len(steady), clip_rate), why=_why(found, len(steady))
    )


def _none(clip_rate: float | int, nonfinite: int, kept: int) -> Suggestion:
    """What is said of a run that exploded before its usual norm could be seen."""
    return Suggestion(
        value=np.nan,
        clip_rate=np.nan,
        rates=(),
        drift=1.0,
        warmup=0,
        spikes=0.0,
        nonfinite=nonfinite,
        recorded=None,
        warning=f"This run exploded after {naming.counted(kept, 'step')}. A threshold"
        f" needs at least {_FEWEST} steps before the norms grow.",
        rule=None,
        asked=float(clip_rate),
        exploded=True,
        of_all=np.nan,
    )


def _first(rate: _Rate | None, values: np.ndarray, kept: int) -> str:
    """What to change about the learning rate of a run that exploded."""
    if rate is None:
        return "use a lower learning rate, for example a third of the present one"
    row = np.flatnonzero(values > 0)[kept]  # the first norm of the explosion
    jumped = jump(rate.steps, rate.values, int(rate.of_norms[row]))
    if jumped is not None:
        return (
            f"go back to a learning rate of {jumped.before:.4g}: at step"
            f" {jumped.step:,} the learning rate rose to {jumped.after:.4g}, and then"
            " training exploded"
        )
    before = rate.values[rate.steps <= rate.of_norms[row]]
    high = float(before.max(initial=0.0))
    if not (np.isfinite(high) and high > 0):
        return "use a lower learning rate, for example a third of the present one"
    return (
        f"use a lower learning rate, for example {high / 3:.2g}, which is a third of"
        f" {high:.4g}"
    )


def _norms(norms: Any, limit: Any) -> tuple[np.ndarray, np.ndarray, _Rate | None]:
    """The norms that were recorded, the threshold of each step, and learning rates.

    The threshold is infinite if there was none, and NaN where it was not recorded.
    """
    steps = rate = None
    of_run = isinstance(norms, str) or hasattr(norms, "__fspath__")
    if of_run or hasattr(norms, "steps"):
        columns = naming.with_whole_norm(readers.columns_of_run(norms))
        name = naming.pick(columns, "norm", None, norms if of_run else norms.path)
        norms = Recorded(columns, name)
    if isinstance(norms, Recorded):
        columns, name = norms
        norms = naming.norms_of_all_steps(columns, name)
        if limit is None and not is_compressed(columns, name):
            limit = naming.limits_beside(columns, name)
        steps, rate = columns[STEP], _rate(columns)
    values = np.asarray(norms, np.float64)
    if values.ndim != 1:
        raise ValueError(
            f"Expected the norms of one run, one a step, got shape {values.shape}."
            " Of several seeds, suggest for each: suggest_threshold(norms[:, 0])."
        )
    if np.any(values < 0):
        raise ValueError(
            f"Expected norms >= 0, got {values[values < 0][0]:g} at index"
            f" {int(np.argmax(values < 0))}. Is this another column?"
        )
    limits = np.asarray(np.inf if limit is None else limit, np.float64)
    if limits.ndim and limits.shape != values.shape:
        raise ValueError(
            f"Expected one limit, or one for each of the {len(values)} norms, got"
            f" limit of shape {limits.shape}."
        )
    if np.any(limits < 0):
        raise ValueError(f"Expected limit >= 0, got {np.nanmin(limits):g}.")
    there = present(values)
    if rate is not None and steps is not None:
        rate = rate._replace(of_norms=steps[there])
    return values[there], np.broadcast_to(limits, values.shape)[there], rate


def _rate(columns: Columns) -> _Rate | None:
    """The learning rates of a run, if one column has them."""
    try:
        rates = np.asarray(columns[naming.pick(columns, "schedule")], np.float64)
    except ReadError:
        return None
    there = present(rates)
    return _Rate(columns[STEP][there], rates[there], columns[STEP])


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
    stretch = max(_FEWEST, len(levels) // 3)
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
    most = value if drift < 1 else _TIMES * _median(_cut(norms, 3)[-1])
    bound = f"max_norm={most:.4g}"
    return f'optax_clipx.quantile_clip({quantile:.4g}, estimator="tracker", {bound})'


def _why(found: Suggestion, count: int) -> str:
    """Why the threshold does not clip the fraction of the steps that was asked for."""
    if abs(found.clip_rate - found.asked) <= max(0.005, 1 / count):
        return ""
    if found.recorded is not None and found.recorded == found.value:
        return (
            "nearly all norms are above the threshold that this run was clipped with,"
            " and no higher threshold is suggested"
        )
    if found.rule and found.drift < 1:
        steps = "these steps" if found.exploded else "the run"
        return (
            "the norms fall. The threshold clips"
            f" {_percent(found.asked)} of the last third of {steps}, and more of the"
            " steps before, whose norms are higher"
        )
    if found.spikes > found.asked:
        return (
            f"{_percent(found.spikes)} of the steps {_high(found)}, and the threshold"
            f" clips them and {_percent(found.asked)} of the other steps"
        )
    return (
        f"norms that are equal to the threshold are not clipped, and the {count} norms"
        " have no value with this fraction above it"
    )


def _high(found: Suggestion) -> str:
    """What norms far above the others are: the end of a rise, or spikes."""
    if found.rule and found.drift > 1:
        return "have high norms, because the norms grow"
    return "are spikes"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _warning(found: Suggestion, count: int, clip_rate: float) -> str:
    said = []
    if found.recorded == found.value:
        said.append(
            "Nearly every step of this run was clipped, with a median threshold of"
            f" {found.value:.4g}. Such a run gives no information about higher"
            " thresholds."
        )
    if found.exploded:
        said.append(
            f"This run exploded. The threshold comes from the {count} steps before the"
            " norms grew. Choose a threshold again from a run that does not explode."
        )
    if found.rule:
        run = "these steps" if found.exploded else "the run"
        said.append(
            f"The norms change during {run}: the median norm of the last third is"
            f" {found.drift:.3g} times the median norm of the first third. So a fixed"
            f" threshold clips {min(found.rates):.0%} of the steps at one time, and"
            f" {max(found.rates):.0%} at another time."
            + (" The threshold above is for the last third." if found.drift < 1 else "")
        )
    if found.spikes > clip_rate:
        said.append(
            f"{found.spikes:.0%} of the steps {_high(found)}, which is more than the"
            f" goal of {clip_rate:.0%}. The threshold comes from the other"
            " steps."
        )
    if count < _FEW:
        said.append(f"There are only {naming.counted(count, 'norm')} to choose from.")
    return " ".join(said)


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
