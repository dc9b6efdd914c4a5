"""Clipping and norms as pure functions of pytrees."""

from ._clipping.functional import (
    adaptive_grad_clip as adaptive_grad_clip,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_leaf_norm as clip_by_leaf_norm,
    clip_by_value as clip_by_value,
    global_norm as global_norm,
    group_norms as group_norms,
    leaf_norms as leaf_norms,
    unit_norms as unit_norms,
)

__all__ = [
    "adaptive_grad_clip",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "global_norm",
    "group_norms",
    "leaf_norms",
    "unit_norms",
]
