"""Threshold rules, one a file: how large may a norm be?

In: norms, the state of the rule, and a context (step, parameters' norms, loss).
Out: a threshold for each norm, and the next state. No rule knows of leaves or meshes.
May import: `_reductions` (the norm of all groups), `_trees`.
"""
