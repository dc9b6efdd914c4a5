"""Clipping inside the backward pass: the identity forward, a clip of the cotangents."""

from ._clipping.backward import (
    clip_norm as clip_norm,
    clip_value as clip_value,
    zero_nonfinite as zero_nonfinite,
)

__all__ = [
    "clip_norm",
    "clip_value",
    "zero_nonfinite",
]
