"""The four parts put together: measure, threshold, response, apply.

In: updates, a state, and the three parts that a method is made of.
Out: clipped updates, the next state, and metrics that say what was done.
May import: `_thresholds`, `_reductions`, `_devices`, `_trees`.
"""
