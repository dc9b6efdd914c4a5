"""Clipping each example's gradient by itself, before the sum over the batch.

In: a loss of one example, and a batch. Out: the sum of clipped gradients, and norms.
May import: `_clipping` and what is below it; never `_methods`, `_wrappers` or `runs`.
"""

from ._gradients import (
    ClippedExamples as ClippedExamples,
    clipped_grad as clipped_grad,
)
from ._metrics import metrics as metrics
from ._noise import noise_scale as noise_scale
from ._optax_names import (
    per_example_global_norm_clip as per_example_global_norm_clip,
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from ._psac import psac as psac
from ._slack import slack_indicator as slack_indicator
from ._users import group_by_user as group_by_user

__all__ = [
    "ClippedExamples",
    "clipped_grad",
    "group_by_user",
    "metrics",
    "noise_scale",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "psac",
    "slack_indicator",
]


def __dir__() -> list[str]:
    return __all__
