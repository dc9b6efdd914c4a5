"""The named methods, one kind a file, each with its paper's defaults.

In: the hyperparameters of a paper.
Out: a gradient transformation, where possible one call of `clip_by`.
May import: `_clipping` and what is below it.
"""
