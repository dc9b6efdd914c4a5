"""Sizes that may be symbols: `jax.export` knows some only when a program is called."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Size = Any  # an int, or a symbol that stands for one


def is_known(*sizes: Size) -> bool:
    """Whether all of these are numbers, which can be compared."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def as_number(size: Size) -> float | jax.Array:
    """A size to compute with: a float, or an array of what a symbol stands for."""
    return float(size) if is_known(size) else jnp.asarray(size).astype(jnp.float32)
