"""Attention for QK-Clip: layouts of its weights, and the largest logit of each head."""

from ._methods.qk_flax import flax as flax
from ._methods.qk_layouts import (
    Layout as Layout,
    fused as fused,
    gqa as gqa,
    mha as mha,
    mla as mla,
)
from ._methods.qk_logits import (
    max_logits as max_logits,
    recorded as recorded,
    recording as recording,
)

__all__ = [
    "Layout",
    "flax",
    "fused",
    "gqa",
    "max_logits",
    "mha",
    "mla",
    "recorded",
    "recording",
]
