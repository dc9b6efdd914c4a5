"""What the rest of a run adds to a finding: its usual norm, and the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import criteria
from .advice import MUON, WITHOUT_MUON
from .findings import Finding, advice
from .signals import Signals

_DIVERGED = ("growing-norms", "loss-diverged")
_TIMES = 3  # the usual norm: above usual norms, far below those of an explosion


def in_context(found: Sequence[Finding], run: Signals) -> list[Finding]:
    """Findings with the numbers of this run in their evidence and their advice."""
    return [_completed(finding, found, run) for finding in found]


def _completed(finding: Finding, found: Sequence[Finding], run: Signals) -> Finding:
    more: dict[str, Any] = {}
    usual = None
    if finding.code == "warmup-spike":
        usual = finding.evidence["later_norms"]
    elif finding.code in _DIVERGED:
        start = min(x.steps[0] for x in found if x.code in _DIVERGED)
        usual = _usual_norm(run, start)
        more = {} if usual is None else {"usual_norm": usual}
    if finding.code == "growing-norms":
        more |= _peak(run, finding.steps[0])
    words = {} if usual is None else {"max_norm": f"{float(f'{_TIMES * usual:.2g}'):g}"}
    if finding.evidence.get("starved_by") == MUON:
        words["line"] = WITHOUT_MUON
    if isinstance(run.source, Path):
        words["run"] = repr(str(run.source))
    return finding._replace(
        evidence={**finding.evidence, **more}, advice=advice(finding.code, **words)
    )


def _usual_norm(run: Signals, start: int) -> float | None:
    """The median norm before a step; None if too few norms are known."""
    if run.norm is None:
        return None
    norms = run.norm.logs().before(start).values
    few = len(norms) < criteria.LEAST_IN_WINDOW
    return None if few else float(np.exp(np.median(norms)))


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
