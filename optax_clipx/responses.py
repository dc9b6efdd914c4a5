"""Responses: the factor by which updates above their threshold are multiplied."""

from ._clipping.responses import (
    biweight as biweight,
    drop as drop,
    normalize as normalize,
    rescale as rescale,
    smooth as smooth,
)

__all__ = [
    "biweight",
    "drop",
    "normalize",
    "rescale",
    "smooth",
]
