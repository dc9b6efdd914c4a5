"""Wrappers around an optimizer or a clipper, and states carried between them.

In: a gradient transformation.
Out: one that skips, resets, tracks, reports, excludes, or pays back what was clipped.
May import: `_clipping` and what is below it; never a named method.
"""
