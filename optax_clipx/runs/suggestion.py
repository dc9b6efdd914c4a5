"""`Suggestion`: a suggested threshold, and why it is the one, in words."""

from typing import NamedTuple

import numpy as np

from . import naming

FEWEST = 20  # norms before an explosion; with fewer no threshold is suggested
_FEW = 100
_TRACKER_RATE = 0.02  # the default learning_rate of thresholds.quantile_tracker
_FAULTS = (
    "this threshold is for a run without faults. If optax_clipx.diagnose finds a fault"
    " and names another clipper, use that clipper"
)
_MOST = 0.5  # of the steps clipped: their threshold was chosen on purpose


class Suggestion(NamedTuple):
    """A suggested threshold, and its clip rate on the recorded run.

    If training exploded or diverged, all numbers describe the steps before that.

    Attributes:
        value: the threshold. It is NaN if training exploded or diverged too early to
            suggest a threshold.
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
        first: what to change about the learning rate first, if training exploded or
            diverged.
        clipped: the fraction of steps that were clipped when the run was recorded.
        of_all: the fraction of steps whose norm was above ``value``, with the warm-up.
        late_rate: the fraction of the last third of these steps whose norm was above
            ``value``.
        diverged: the first step of the divergence, if the loss shows that the run
            diverged. If the norms grew before, it is the first step of this growth. The
            steps from there on are left out. Otherwise it is ``None``.
        seen: a sentence that says where the run diverged, and what shows this.
        doubt: a sign of a divergence in a run whose loss was not recorded.
        max_norm: an upper bound for the threshold of an adaptive method, as in
            ``zclip(max_norm=...)``: 3 times the median norm of the steps before
            training exploded or diverged, or of all steps. If the norms of these steps
            fall, it is 3 times the median norm of their last third. It is NaN if there
            are fewer than 5 such steps. :func:`diagnose` prints the same number.
        max_norm_from: where ``max_norm`` comes from, in words.
    """

    value: float
    clip_rate: float
    rates: tuple[float, ...]
    drift: float
    warmup: int
    spikes: float
    nonfinite: int
    recorded: float | None
    rule: str | None
    warning: str = ""
    asked: float = 0.1
    why: str = ""
    exploded: bool = False
    first: str = ""
    clipped: float = 0.0
    of_all: float = 0.0
    late_rate: float = 0.0
    diverged: int | None = None
    seen: str = ""
    doubt: str = ""
    max_norm: float = np.nan
    max_norm_from: str = ""

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
        if self._failed:
            return self._after_failure(clipper)
        if self.recorded == self.value:
            return [
                "record another run first, with optax_clipx.zclip() or with a much"
                f" higher threshold, such as {10 * self.value:.4g}"
            ]
        return [clipper]

    def _after_failure(self, clipper: str) -> list[str]:
        """What to do about a run that exploded or diverged."""
        lines = [f"first {self.first}"]
        if self.diverged is not None:
            alone = "A threshold alone does not prevent this"
            lines.insert(0, f"{self.seen}. {alone}")
        if np.isnan(self.value):
            return [*lines, "then record the norms again with optax_clipx.auto_clip()"]
        if np.isnan(self.max_norm):
            return [*lines, f"then {clipper} as a second protection"]
        return [
            *lines,
            f"then use optax_clipx.zclip(max_norm={self.max_norm:g}) as a second"
            f" protection: {self.max_norm_from}",
            f"if you prefer a fixed threshold, {clipper} instead",
        ]

    @property
    def _failed(self) -> bool:
        return self.exploded or self.diverged is not None

    @property
    def _before(self) -> str:
        """Up to where steps are used, in words."""
        if self.diverged is None:
            return "before the norms grew"
        return f"before step {self.diverged:,}"

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
        if self._failed:
            which, these = f"{which} {self._before}", "these steps"
            of_all += f" {self._before}" if of_all else ""
        it = "this fixed threshold" if self._failed else "it"
        if self._rises():
            it = f"a fixed threshold instead, {self._fixed()},"
        return [
            f"{it} would have clipped {self.clip_rate:.1%} of {which}{of_all}; the"
            f" goal is {_percent(self.asked)}",
            f"in ten equal parts of {these}, the lowest clip rate would have been"
            f" {low:.1%}, and the highest clip rate {high:.1%}",
        ]

    def _alternatives(self) -> list[str]:
        """What else to use where training failed, or where the norms change."""
        if self._failed:
            return []
        faults = [_FAULTS] if self.recorded != self.value else []
        if not self.rule:
            return faults
        sweep = "to compare thresholds by their loss, use optax_clipx.find_threshold"
        if self._rises():
            return [*faults, sweep]
        tracker = (
            f"if you train longer and the norms keep falling, use {self.rule}: its"
            f" threshold is at most {self.value:.4g} and falls by at most"
            f" {_percent(_TRACKER_RATE * self.asked)} in each step"
        )
        without = (
            "if you do not want to choose a threshold, use optax_clipx.auto_clip()"
        )
        without_choice = [without] if self.clipped <= _MOST else []
        return [tracker, *without_choice, *faults, sweep]


def explained(found: Suggestion, count: int) -> Suggestion:
    """A suggestion from so many steps, with its reasons."""
    if np.isnan(found.value):
        return found._replace(warning=_too_early(found, count))
    return found._replace(warning=_warning(found, count), why=_why(found, count))


def _too_early(found: Suggestion, count: int) -> str:
    after = naming.counted(count, "step")
    if found.diverged is None:
        failed, before = f"exploded after {after}", "the norms grow"
    else:
        failed, before = f"diverged after {after}", "that"
    return (
        f"This run {failed}. A threshold needs at least {FEWEST} steps before {before}."
    )


def _why(found: Suggestion, count: int) -> str:
    """Why the threshold does not clip the fraction of the steps that was asked for."""
    if _is_near(found.clip_rate, found.asked, count):
        return ""
    if found.recorded is not None and found.recorded == found.value:
        return (
            "nearly all norms are above the threshold that this run was clipped with,"
            " and no higher threshold is suggested"
        )
    if found.rule and found.drift < 1:
        steps = "these steps" if found._failed else "the run"
        near = _is_near(found.late_rate, found.asked, count // 3)
        late = _percent(found.asked if near else found.late_rate)
        late += f" of the last third of {steps}"
        if found.clip_rate > found.late_rate:
            return (
                f"the norms fall. The threshold clips {late}, and more of the steps"
                " before, whose norms are higher"
            )
        return (
            "most norms fall, but the largest ones do not. The threshold clips"
            f" {late}, and fewer of the steps before"
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


def _is_near(rate: float, asked: float, count: int) -> bool:
    """Whether a rate of so many steps is as near to another as it can be."""
    return abs(rate - asked) <= max(0.005, 1 / count)


def _high(found: Suggestion) -> str:
    """What norms far above the others are: the end of a rise, or spikes."""
    if found.rule and found.drift > 1:
        return "have high norms, because the norms grow"
    return "are spikes"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _warning(found: Suggestion, count: int) -> str:
    said = [found.doubt] if found.doubt and not found._failed else []
    if found.recorded == found.value:
        said.append(
            "Nearly every step of this run was clipped, with a median threshold of"
            f" {found.value:.4g}. Such a run gives no information about higher"
            " thresholds."
        )
    if found._failed:
        exploded = found.diverged is None
        failed, fails = ("exploded", "explode") if exploded else ("diverged", "diverge")
        said.append(
            f"This run {failed}. The threshold comes from the {count} steps"
            f" {found._before}. Choose a threshold again from a run that does not"
            f" {fails}."
        )
    if found.rule:
        run = "these steps" if found._failed else "the run"
        said.append(
            f"The norms change during {run}: the median norm of the last third is"
            f" {found.drift:.3g} times the median norm of the first third. So a fixed"
            f" threshold clips {min(found.rates):.0%} of the steps at one time, and"
            f" {max(found.rates):.0%} at another time."
            + (" The threshold above is for the last third." if found.drift < 1 else "")
        )
    if found.spikes > found.asked:
        said.append(
            f"{found.spikes:.0%} of the steps {_high(found)}, which is more than the"
            f" goal of {found.asked:.0%}. The threshold comes from the other"
            " steps."
        )
    if count < _FEW:
        said.append(f"There are only {naming.counted(count, 'norm')} to choose from.")
    return " ".join(said)
