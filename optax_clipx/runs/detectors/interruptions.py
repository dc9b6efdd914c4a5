"""Non-finite numbers, skipping without end, and restarts."""

import numpy as np

from .. import criteria
from ..findings import Finding, finding
from ..naming import WHOLE
from ..signals import Line, Signals, breaks_at


def nonfinite(run: Signals) -> list[Finding]:
    """The first step with a NaN or infinity, in what it was, and whether it stays."""
    first: dict[str, tuple[int, float]] = {}
    count, ends, all_skipped = 0, False, True
    for line in _watched(run):
        bad = np.flatnonzero(~np.isfinite(line.values))
        if len(bad):
            all_skipped &= _are_skipped(run, line.steps[bad])
            at = int(line.steps[bad[0]])
            first[_measured_as(run, line, at)] = at, float(line.values[bad[0]])
            count = max(count, len(bad))
            ends |= bool((~np.isfinite(line.values[-2:])).all())
    if not first:
        return []
    step = min(at for at, _ in first.values())
    where = [name for name, (at, _) in first.items() if at == step]
    where = [name for name in where if name != WHOLE] or where  # is in no file
    leaves = [n for n, line in run.leaves.items() if line.name in where]
    loss_too = run.loss is not None and run.loss.name in where
    all_skipped &= not any(breaks_at(line) is not None for line in _watched(run))
    bad_end = ends or count >= criteria.NONFINITE_STEPS
    return [
        finding(
            "nonfinite",
            "info" if all_skipped else "error" if bad_end else "warning",
            [step],
            count=count,
            value="NaN" if np.isnan(first[where[0]][1]) else "infinity",
            **{"first_in": where[0], "leaves": leaves, "in_loss": loss_too},
            **({"all_skipped": True} if all_skipped else {}),
            column=where[0],
        )
    ]


def _are_skipped(run: Signals, steps: np.ndarray) -> bool:
    """Whether all of these steps were skipped."""
    if run.skipped is None:
        return False
    return bool(np.isin(steps, run.skipped.steps[run.skipped.values > 0]).all())


def _measured_as(run: Signals, line: Line, step: int) -> str:
    """The column that has a norm: on skipped steps, that of the skipper."""
    values = run.columns.get("skip/norm")
    if run.norm is None or line.name != run.norm.name:
        return line.name
    own = run.columns[line.name][run.steps == step]
    return line.name if values is None or not np.isfinite(own).all() else "skip/norm"


def _watched(run: Signals) -> list[Line]:
    lines = [run.loss, run.norm, run.update_norm, *run.leaves.values()]
    return [line for line in lines if line is not None]


def locked(run: Signals) -> list[Finding]:
    """Steps that are skipped one after the other, without end."""
    assert run.skipped is not None
    flags = run.skipped.values > 0
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return []
    longest = int(np.argmax(stops - starts))
    start, stop = int(starts[longest]), int(stops[longest])
    if stop - start < max(criteria.LOCKED_STEPS, criteria.LOCKED_PART * len(flags)):
        return []
    # A norm that passed now and then ends no lock-out.
    shares = np.array([flags[x:stop].mean() for x in starts[: longest + 1]])
    start = int(starts[np.argmax(shares >= criteria.LOCKED_SHARE)])
    to_the_end = stop == len(flags)
    return [
        finding(
            "lock-out",
            "error",
            [run.skipped.steps[start], run.skipped.steps[stop - 1]],
            **{"in_a_row": stop - start, "to_the_end": to_the_end},
            column=run.norm.name if run.norm is not None else run.skipped.name,
        )
    ]


def restarts(run: Signals) -> list[Finding]:
    """Steps that go back: a run that was resumed, or several runs in one file."""
    back = run.restarts
    if not back.steps:
        return []
    return [
        finding(
            "restarts",
            "error" if back.mixed else "info" if back.dropped else "warning",
            back.steps,
            count=len(back.steps),
            kind="several runs mixed" if back.mixed else "resumed",
            **{"before": list(back.before)},
            column=(run.loss or run.norm or Line("", run.steps, run.steps)).name,
        )
    ]
