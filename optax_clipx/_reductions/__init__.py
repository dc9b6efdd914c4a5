"""Reductions: the norms of groups of leaves, right at any magnitude.

In: leaves, their placements, and groups (the tree, labels, leaves, units).
Out: one norm for each group, and the norm of all groups together.
May import: `_devices`, `_trees`.
"""
