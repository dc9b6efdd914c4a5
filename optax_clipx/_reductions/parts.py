"""Parts of a vector, cut out where they are used.

Leaves that are alike except in where their scale lies in a vector differ, for XLA, only
in one number. As long as it does not know that number, it compiles one loop for all.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector", "start"],
    meta_fields=["shape"],
)
@dataclass(frozen=True)
class Part:
    """What lies in a vector from a start on, to be cut out where it is used.

    A start may be an array that XLA does not know, as those of `unknown`.
    """

    vector: jax.Array
    start: Any
    shape: tuple[int, ...]


def cut(part: Any) -> Any:
    """The array of a part; what is no part is itself."""
    if not isinstance(part, Part):
        return part
    size = (math.prod(part.shape),)
    return lax.dynamic_slice(part.vector, (part.start,), size).reshape(part.shape)


def unknown(starts: Sequence[int], used: jax.Array) -> tuple[Any, ...]:
    """The starts as numbers that XLA does not know; zeros where they are not used.

    What cuts a vector at a number that XLA knows is compiled for each leaf anew; at
    one that it does not, once for all leaves of a shape.
    """

    def numbers() -> tuple[Any, ...]:
        return tuple(map(np.uint32, starts))

    def zeros() -> tuple[Any, ...]:
        return (np.uint32(0),) * len(starts)

    return lax.cond(used, numbers, zeros) if starts else ()
