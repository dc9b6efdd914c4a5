"""Norms of leaves: one that dominates, others that starve, dead ones, and depth."""

import re

import numpy as np

from .. import criteria
from ..advice import MUON
from ..findings import Finding, finding
from ..levels import ranks_agree
from ..signals import Line, Signals

_LONGEST_NAME = 1000  # characters: files may hold anything


def dominant(run: Signals) -> list[Finding]:
    """One leaf that holds most of the squared norm in most of the steps."""
    if len(run.sound_leaves) < criteria.LEAST_LEAVES:
        return []
    steps, table = run.leaf_levels
    tiny = np.finfo(float).tiny
    squares = (table / np.maximum(table.max(axis=0), tiny)) ** 2  # cannot overflow
    shares = squares / np.maximum(squares.sum(axis=0), tiny)
    share = np.median(shares, axis=1)
    at = int(share.argmax())
    next_largest = np.sort(share)[-2] * criteria.DOMINANT_FACTOR**2
    if share[at] < max(criteria.DOMINANT, next_largest):
        return []
    name = list(run.sound_leaves)[at]
    return [
        finding(
            "dominant-leaf",
            "warning",
            _stretch(steps, shares[at] >= criteria.DOMINANT),
            leaf=name,
            **{"share": float(share[at])},
            column=run.sound_leaves[name].name,
        )
    ]


def starved(run: Signals) -> list[Finding]:
    """All leaves whose steps are much smaller by one leaf's part in the norm."""
    limit = run.threshold
    by_muon = None if limit is None else _starved_by_muon(run, limit)
    if by_muon is not None:
        return [by_muon]
    if len(run.sound_leaves) < criteria.LEAST_LEAVES or limit is None:
        return []
    steps, table = run.leaf_levels
    limits = np.interp(steps, limit.steps, np.nan_to_num(limit.values, posinf=np.inf))
    tiny = np.finfo(float).tiny
    largest = np.maximum(table.max(axis=0), tiny)
    squares = np.sum((table / largest) ** 2, axis=0)
    whole = largest * np.sqrt(squares)
    others = largest * np.sqrt(np.maximum(squares - 1, 0))
    without = np.minimum(1, limits / np.maximum(others, tiny))
    factor = without / np.minimum(1, limits / np.maximum(whole, tiny))
    starving = factor >= criteria.STARVED
    if starving.mean() < criteria.STARVED_STEPS:
        return []
    names = list(run.sound_leaves)
    by = int(np.bincount(table.argmax(axis=0)).argmax())
    return [
        finding(
            "starved-leaves",
            "warning",
            _stretch(steps, starving),
            leaves=[name for i, name in enumerate(names) if i != by],
            **{"starved_by": names[by], "factor": float(np.median(factor[starving]))},
            column=run.sound_leaves[names[by]].name,
        )
    ]


def _starved_by_muon(run: Signals, threshold: Line) -> Finding | None:
    """The same of the leaves together whose steps do not depend on any norm."""
    share, norm = run.muon_share, run.norm
    if share is None or norm is None:
        return None
    steps = share.steps
    whole = np.interp(steps, norm.steps, np.nan_to_num(norm.values))
    limits = np.interp(steps, threshold.steps, np.nan_to_num(threshold.values))
    tiny = np.finfo(float).tiny
    others = whole * np.sqrt(np.maximum(1 - share.values, 0))
    without = np.minimum(1, limits / np.maximum(others, tiny))
    factor = without / np.minimum(1, limits / np.maximum(whole, tiny))
    starving = factor >= criteria.STARVED  # a share of NaN starves nobody
    if starving.mean() < criteria.STARVED_STEPS:
        return None
    return finding(
        "starved-leaves",
        "warning",
        _stretch(steps, starving),
        starved_by=MUON,
        **{"factor": float(np.median(factor[starving]))},
        share=float(np.median(share.values[starving])),
        column=share.name,
    )


def dead(run: Signals) -> list[Finding]:
    """Leaves without a gradient, from some step to the end."""
    _, table = run.leaf_levels
    usual = float(np.median(table))
    found = []
    for name, line in run.sound_leaves.items():
        least = criteria.DEAD * min(usual, float(np.max(line.values, initial=0.0)))
        alive = np.flatnonzero(~(line.values <= least))
        start = int(alive[-1]) + 1 if len(alive) else 0
        if len(line.values) - start >= criteria.DEAD_STEPS:
            found.append((int(line.steps[start]), name))
    if not found:
        return []
    names = [name for _, name in sorted(found)]
    return [
        finding(
            "dead-leaf",
            "warning",
            [step for step, _ in sorted(found)],
            leaves=names,
            column=run.sound_leaves[names[0]].name,
        )
    ]


def depth(run: Signals) -> list[Finding]:
    """Norms that fall or rise by a large factor from the last layer to the first."""
    steps, table = run.leaf_levels
    tiny = np.finfo(float).tiny
    levels = np.log(np.maximum(np.median(table, axis=1), tiny))
    names, worst, found = list(run.sound_leaves), 0.0, []
    for depths, rows in _stacks(names):
        per_layer = levels[rows]
        alive = per_layer > np.log(tiny)
        per_layer, depths = per_layer[alive], depths[alive]
        if len(per_layer) < criteria.LEAST_DEPTH:
            continue
        change = _first_over_last(depths, per_layer)
        agrees = abs(ranks_agree(depths, per_layer)) >= criteria.DEPTH_RANK
        if agrees and abs(change) > max(criteria.DEPTH_FACTOR, abs(worst)):
            worst = change
            found = [names[rows[0]], names[rows[-1]]]
    if not found:
        return []
    return [
        finding(
            "vanishing-by-depth" if worst < 0 else "exploding-by-depth",
            "warning",
            [steps[0], steps[-1]],
            first=found[0],
            last=found[1],
            **{"first_over_last": float(np.exp(worst))},
            column=run.sound_leaves[found[0]].name,
        )
    ]


def _first_over_last(depths: np.ndarray, levels: np.ndarray) -> float:
    """The logarithm of the factor, by a straight line: no layer decides it alone."""
    slope = np.polyfit(depths, levels, 1)[0]
    return float(-slope * np.ptp(depths))


def _stacks(names: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Leaves that differ in one number of their name: depths, and their rows."""
    stacks: dict[tuple[str, str], dict[int, int]] = {}
    for row, name in enumerate(names):
        if len(name) > _LONGEST_NAME:
            continue
        for match in re.finditer(r"\d{1,9}", name):
            around = name[: match.start()], name[match.end() :]
            stacks.setdefault(around, {})[int(match[0])] = row
    return [
        (np.array(sorted(rows)), np.array([rows[d] for d in sorted(rows)]))
        for rows in stacks.values()
        if len(rows) >= criteria.LEAST_DEPTH
    ]


def _stretch(steps: np.ndarray, where: np.ndarray) -> list[int]:
    """The first and the last step of those that are chosen."""
    at = np.flatnonzero(where)
    return [int(steps[at[0]]), int(steps[at[-1]])]
