"""Measures: which entries of the updates share one norm."""

from ._clipping.measures import (
    Measure as Measure,
    group_norms as group_norms,
    leaf_norms as leaf_norms,
    magnitudes as magnitudes,
    tree_norm as tree_norm,
    unit_norms as unit_norms,
)

__all__ = [
    "Measure",
    "group_norms",
    "leaf_norms",
    "magnitudes",
    "tree_norm",
    "unit_norms",
]
