"""Rules that say which axes of a leaf one output unit spans."""

from ._clipping.units import (
    equinox as equinox,
    flax as flax,
    haiku as haiku,
    of_model as of_model,
    show as show,
    stacked as stacked,
)

__all__ = [
    "equinox",
    "flax",
    "haiku",
    "of_model",
    "show",
    "stacked",
]
