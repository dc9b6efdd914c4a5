"""The norm of the whole tree from the norms of its groups, and no other pass.

A whole norm is carried as `(peak, total)`: it is `peak * total^(1/p)`, and no power of
a norm leaves the range.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.arithmetic import (
    both,
    finite,
    more,
    power,
    quotient,
    smaller,
    total,
    where,
)
from .plan import Ord


def powers(norms: jax.Array, peak: jax.Array, ord: Ord) -> jax.Array:
    """Each norm in units of the largest, to the power whose sum makes the whole one."""
    if ord == float("inf"):
        return norms
    return power(quotient(norms, safe(peak)), _exponent(ord))


def as_norm(peak: jax.Array, summed: jax.Array, size: object, ord: Ord) -> jax.Array:
    """The norm as a number, of so many entries."""
    if ord == float("inf"):
        return peak
    if ord == "rms":
        summed = summed / jnp.asarray(size, summed.dtype)
    norm = lax.mul(safe(peak), power(summed, 1 / _exponent(ord)))
    largest = float(jnp.finfo(norm.dtype).max)
    return where(finite(summed), smaller(norm, largest), norm)


def whole_norm(norms: jax.Array) -> jax.Array:
    """The 2-norm of norms: that of all groups together."""
    peak = jnp.max(norms)
    return as_norm(peak, total(powers(norms, peak, 2.0)), 1, 2.0)


def safe(peak: jax.Array) -> jax.Array:
    """The peak, or 1 where nothing can be divided by it."""
    return where(both(more(peak, 0), finite(peak)), peak, 1)


def _exponent(ord: Ord) -> float:
    return 2.0 if isinstance(ord, str) else ord
