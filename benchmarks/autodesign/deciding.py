"""The rules of decision of the second and the fourth round, as their page has them."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from clipbench.report import NEAR, chosen_elsewhere, ratio

from autodesign.designs import FIRST_CHOSEN, PACKAGE, last_designs, later_designs

Record = dict[str, Any]
Row = dict[str, Record]
GOAL = 0.9  # of the share of the best fixed threshold that other seeds chose
WORST = 5.0  # a larger ratio counts as this, and one below its inverse as that
EQUAL = 1.01  # means that differ by less are equal


def decision(rows: list[Row]) -> str:
    """The name of the design that the rule of the second round chooses.

    A design with an unbounded clipped norm is no candidate.
    """
    names = [FIRST_CHOSEN, *later_designs()]
    return best(equals(rows, names, fixed_ratios(rows)), rows)


def last_decision(rows: list[Row], before: list[Row]) -> str:
    """The name of the design that the rule of the fourth round chooses.

    The rows before are of the same cells, with other seeds. The package's rule stays
    where no design is better.
    """
    stable = np.where(np.isfinite(fixed_ratios(before)), fixed_ratios(rows), np.inf)
    equal = equals(rows, [PACKAGE, *last_designs()], stable)
    return PACKAGE if PACKAGE in equal else best(equal, rows)


def fixed_ratios(rows: list[Row]) -> np.ndarray:
    """What the fixed threshold reaches that other seeds chose."""
    return infinite(chosen_elsewhere(row) for row in rows)


def infinite(ratios: Iterable[float]) -> np.ndarray:
    """An array; where all fixed thresholds diverge, no ratio is a number."""
    with np.errstate(invalid="ignore"):
        found = np.fromiter(ratios, float)
    return np.where(np.isnan(found), np.inf, found)


def equals(
    rows: list[Row], names: Collection[str], survived: np.ndarray
) -> dict[str, np.ndarray]:
    """The ratios of the designs that the first three points of the rule leave.

    A design must not diverge where `survived` is finite; if all do, those are left that
    do so in the fewest cells.
    """
    names = [n for n in names if all(n in r for r in rows)]
    found = {n: infinite(ratio(row, n) for row in rows) for n in names}
    lost = {n: np.sum(np.isinf(r) & np.isfinite(survived)) for n, r in found.items()}
    left = {n: r for n, r in found.items() if lost[n] == min(lost.values())}
    near = {n: np.sum(r <= NEAR) for n, r in left.items()}
    least = GOAL * np.sum(fixed_ratios(rows) <= NEAR)
    if max(near.values()) < least:
        least = max(near.values()) - 2
    good = {n: r for n, r in left.items() if near[n] >= least}
    lowest = min(mean(r) for r in good.values())
    return {n: r for n, r in good.items() if mean(r) < EQUAL * lowest}


def best(equal: dict[str, np.ndarray], rows: list[Row]) -> str:
    """Of equal designs the one with the most cells within 3%.

    Then the one that is worse than no clipping in the fewest cells.
    """
    nones = np.array([ratio(row, "none") for row in rows])
    return max(
        equal,
        key=lambda n: (
            np.sum(equal[n] <= NEAR),
            -np.sum(equal[n] > NEAR * nones),
            -mean(equal[n]),
        ),
    )


def mean(ratios: np.ndarray) -> float:
    """The geometric mean of ratios."""
    return float(np.exp(np.mean(np.log(np.clip(ratios, 1 / WORST, WORST)))))
