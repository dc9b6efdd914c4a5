"""All rules, and what each needs: from the signals of a run to its diagnosis."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import criteria
from .advice import ADVICE
from .causes import CHAIN
from .context import in_context
from .detectors import divergence, interruptions, leaves, rates, shifts, spikes
from .diagnosis import Diagnosis
from .drawing import Envelope, envelope
from .findings import SEVERITIES, Finding
from .signals import Signals
from .table import present

# What a rule needs, as it is called in what could not be judged.
_NEEDS = {
    "loss": "the loss",
    "norm": "the gradient norm",
    "threshold": "the threshold",
    "clipped": "the threshold",
    "update_norm": "the norm of the updates",
    "schedule": "the learning rate",
    "skipped": "the steps that were skipped",
    "sound_leaves": "norms of leaves",
}
_RECORDED = ("loss", "norm", "update_norm", "schedule")


class _Rule(NamedTuple):
    judge: Callable[[Signals], list[Finding]]
    needs: tuple[str, ...]
    codes: tuple[str, ...]
    by_levels: bool = False  # which few steps do not have


_DEPTH = ("vanishing-by-depth", "exploding-by-depth")
_RULES = (
    _Rule(interruptions.nonfinite, (), ("nonfinite",)),
    _Rule(divergence.loss, ("loss",), ("loss-diverged",), True),
    _Rule(divergence.norms, ("norm",), ("growing-norms",), True),
    _Rule(divergence.updates, ("update_norm", "loss"), ("update-before-loss",), True),
    _Rule(interruptions.locked, ("skipped",), ("lock-out",)),
    _Rule(spikes.judge, ("norm",), ("spikes", "periodic-spikes"), True),
    _Rule(shifts.level, ("norm",), ("level-shift",), True),
    _Rule(shifts.schedule, ("norm", "schedule"), ("rises-with-schedule",), True),
    _Rule(rates.warmup, ("norm", "threshold"), ("warmup-spike",), True),
    _Rule(rates.always, ("norm", "clipped"), ("always-clipped",), True),
    _Rule(rates.never, ("norm", "clipped"), ("never-clipped",), True),
    _Rule(leaves.dominant, ("sound_leaves",), ("dominant-leaf",)),
    _Rule(leaves.starved, ("sound_leaves", "threshold"), ("starved-leaves",)),
    _Rule(leaves.dead, ("sound_leaves",), ("dead-leaf",), True),
    _Rule(
        leaves.depth, ("sound_leaves",), ("vanishing-by-depth", "exploding-by-depth")
    ),
    _Rule(interruptions.restarts, (), ("restarts",)),
)


def judge(seen: Signals) -> Diagnosis:
    """What the rules find in some signals."""
    found: list[Finding] = []
    lacking: dict[str, str] = {}
    rules = _RULES[-1:] if seen.restarts.mixed else _RULES
    for rule in rules:
        missing = [name for name in rule.needs if not getattr(seen, name)]
        if missing:
            lacking |= dict.fromkeys(rule.codes, _NEEDS[missing[0]])
        else:
            with np.errstate(all="ignore"):  # files may hold any number
                own = rule.judge(seen)
            found += own
            if rule.by_levels and not own:
                lacking |= _few(seen, rule)
    if seen.restarts.mixed:
        others = [code for code in ADVICE if code != "restarts"]
        lacking = dict.fromkeys(others, "a log of one run")
    found = in_context(sorted(found, key=_rank), seen)
    notice = "" if seen.restarts.mixed else seen.notice
    return Diagnosis(
        tuple(found), lacking, len(seen.steps), _pictures(seen, found), notice
    )


def _few(seen: Signals, rule: _Rule) -> dict[str, str]:
    """The codes of a rule, if its signals have too few steps for it."""
    lines = [getattr(seen, name) for name in rule.needs if name in _RECORDED]
    lines += seen.sound_leaves.values() if "sound_leaves" in rule.needs else ()
    count = min(int(np.isfinite(line.values).sum()) for line in lines)
    if count >= criteria.LEAST_STEPS:
        return {}
    few = f"{criteria.LEAST_STEPS} finite steps; {count} were recorded"
    return dict.fromkeys(rule.codes, few)


def _rank(finding: Finding) -> tuple[int, float, int]:
    """By severity; what belongs to a divergence comes first, in the order of time."""
    step = float(finding.steps[0]) if finding.code in CHAIN else np.inf
    place = list(ADVICE).index(finding.code)
    return SEVERITIES.index(finding.severity), step, place


def _pictures(seen: Signals, found: list[Finding]) -> dict[str, Envelope]:
    """What a page draws: the column of each finding, thinned out."""
    pictures = {}
    for name in {finding.evidence["column"] for finding in found}:
        values = np.asarray(seen.columns[name], np.float64)
        there = present(values)
        pictures[name] = envelope(seen.steps[there], values[there])
    return pictures
