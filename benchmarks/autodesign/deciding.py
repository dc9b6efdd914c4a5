"""The rule of decision of the second round, as its page has it."""

from typing import Any

import numpy as np
from clipbench.report import NEAR, chosen_elsewhere, ratio

from autodesign.designs import FIRST_CHOSEN, later_designs

Record = dict[str, Any]
Row = dict[str, Record]
GOAL = 0.9  # of the share of the best fixed threshold that other seeds chose
WORST = 5.0  # a larger ratio counts as this
EQUAL = 1.01  # means that differ by less are equal


def decision(rows: list[Row]) -> str:
    """The name of the design that the rule chooses.

    A design with an unbounded clipped norm is no candidate.
    """
    fixed = np.array([chosen_elsewhere(row) for row in rows])
    names = [n for n in (FIRST_CHOSEN, *later_designs()) if all(n in r for r in rows)]
    found = {n: np.array([ratio(row, n) for row in rows]) for n in names}
    survivors = {
        n: r for n, r in found.items() if not np.any(np.isinf(r) & np.isfinite(fixed))
    }
    least = GOAL * np.sum(fixed <= NEAR)
    good = {n: r for n, r in survivors.items() if np.sum(r <= NEAR) >= least}
    if not good:
        most = max(np.sum(r <= NEAR) for r in survivors.values())
        good = {n: r for n, r in survivors.items() if np.sum(r <= NEAR) >= most - 2}
    lowest = min(mean(r) for r in good.values())
    equal = {n: r for n, r in good.items() if mean(r) < EQUAL * lowest}
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
    return float(np.exp(np.mean(np.log(np.minimum(ratios, WORST)))))
