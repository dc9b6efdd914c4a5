"""Tables and pictures of what the methods reached."""

import math
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def losses(record: Record) -> np.ndarray:
    """The held-out losses, rates by seeds; infinite where a run diverged.

    A run has diverged if its loss is not finite, or above that of the unigram model.
    """
    found = np.array(record["final"], float)
    return np.where(found <= record["unigram"], found, math.inf)


def best_of_rates(record: Record) -> float:
    """The mean over seeds at the best rate."""
    return float(losses(record).mean(axis=1).min())


def write_report(records: list[Record], path: Path, pictures: Path | None) -> None:
    """Writes and prints the tables; draws the pictures if there is a folder."""
