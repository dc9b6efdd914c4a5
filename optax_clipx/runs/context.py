"""What the rest of a run adds to a finding: its usual norm, and the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import advice as texts, criteria
from .advice import DIVERGED
from .causes import CHAIN
from .findings import Finding, advice
from .rate_jumps import jump
from .signals import Signals
from .trouble import first_of
from .upper_bound import Usual, told, upper_bound, usual_norm

_EXPLAINED = ("update-before-loss", *DIVERGED, "nonfinite")  # by a jump of the rate


def in_context(found: Sequence[Finding], run: Signals) -> list[Finding]:
    """Findings with the numbers of this run in their evidence and their advice."""
    cause = first_of(found)
    return _with_what_came_first([_completed(x, cause, run) for x in found])


def _with_what_came_first(found: Sequence[Finding]) -> list[Finding]:
    """Findings that say so if they probably follow from an error before them."""
    chain = [x for x in found if x.code in CHAIN and x.severity == "error"]
    if not chain:
        return list(found)
    first, start = chain[0], chain[0].steps[0]
    more = {"follows": first.code, "follows_step": start}
    return [
        x._replace(evidence={**x.evidence, **more})
        if x in chain[1:] or _is_after(x, start)
        else x
        for x in found
    ]


def _is_after(finding: Finding, start: int) -> bool:
    other = finding.severity == "info" or finding.code == "restarts"
    return not other and finding.steps[0] > start


def _completed(finding: Finding, cause: Finding | None, run: Signals) -> Finding:
    start = None if cause is None else cause.steps[0]
    usual = _usual(finding, start, run)
    more: dict[str, Any] = {}
    words: dict[str, Any] = {"replaces": run.threshold is not None}
    if usual is not None:
        words["max_norm"] = f"{upper_bound(usual.norm):g}"
        words["max_norm_from"] = told(usual)
        more["max_norm_from"] = words["max_norm_from"]
    if finding.code in DIVERGED and usual is not None:
        more["usual_norm"] = usual.norm
    if finding.code in _EXPLAINED and not finding.evidence.get("all_skipped"):
        more |= _jump(run, finding.steps[0], start)
    if finding.code == "growing-norms" and "rate_jump" not in more:
        more |= _peak(run, finding.steps[0])
    words |= _line(finding, more, cause)
    if isinstance(run.source, Path):
        words["run"] = repr(str(run.source))
    if finding.code == "periodic-spikes":
        words["steps"] = str(finding.steps[:3])
    return finding._replace(
        evidence={**finding.evidence, **more}, advice=advice(finding.code, **words)
    )


def _usual(finding: Finding, start: int | None, run: Signals) -> Usual | None:
    """The norm of usual steps, three times of which the advice has; and its name."""
    line, what, before = run.norm, "the usual norm", finding.steps[0]
    if finding.code == "warmup-spike":
        later = float(finding.evidence["later_norms"])
        return Usual(later, "the median of the later norms")
    if finding.code in DIVERGED and start is not None:
        before = start
    elif finding.code == "update-before-loss":
        line, what = run.update_norm, "the median norm of the updates"
    elif finding.code == "rises-with-schedule":
        before += (finding.steps[-1] - finding.steps[0]) // 4
    else:
        return None
    return usual_norm(line, what, before)


def _line(
    finding: Finding, more: dict[str, Any], cause: Finding | None
) -> dict[str, str]:
    """The line to type, where it is another than that of the code."""
    if finding.evidence.get("starved_by") == texts.MUON:
        return {"line": texts.WITHOUT_MUON}
    if "rate_jump" in more:
        rate, step = more["rate_before"], f"{more['rate_jump']:,}"
        return {"line": texts.NO_JUMP.format(rate=rate, step=step)}
    if finding.evidence.get("all_skipped"):
        return {"line": texts.NOTHING}
    if finding.evidence.get("all_clipped"):
        return {"line": texts.CLIPPED}
    if finding.code != "nonfinite":
        return {}
    if cause is not None and cause.steps[0] <= finding.steps[0]:
        return {"line": texts.AFTER_DIVERGENCE.format(code=cause.code)}
    return {"line": texts.FROM_LOSS} if finding.evidence["in_loss"] else {}


def _jump(run: Signals, own: int, start: int | None) -> dict[str, Any]:
    """Where the learning rate jumps shortly before a finding, or what it follows."""
    if run.schedule is None:
        return {}
    begins = [own] if start is None or start > own else [start, own]
    found = [jump(run.schedule.steps, run.schedule.values, at) for at in begins]
    first = next((x for x in found if x is not None), None)
    if first is None:
        return {}
    return {
        "rate_jump": first.step,
        "rate_before": first.before,
        "rate_after": first.after,
        "rate_factor": first.after / first.before,
    }


def _peak(run: Signals, onset: int) -> dict[str, Any]:
    """Where the learning rate reaches its maximum, if growth starts there."""
    if run.schedule is None:
        return {}
    rate = run.schedule.finite()
    if not len(rate.values):
        return {}
    highest = rate.values.max()
    at = int(np.argmax(rate.values >= highest * (1 - 1e-6)))
    rose = rate.values[0] < criteria.PEAK_RISE * highest
    step = int(rate.steps[at])
    near = criteria.PEAK_NEAR * (run.steps[-1] - run.steps[0])
    if not rose or abs(step - onset) > max(criteria.WINDOW, near):
        return {}
    return {"peak_step": step, "peak_learning_rate": float(highest)}
