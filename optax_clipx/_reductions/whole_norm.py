"""The norm of the whole tree from the norms of its groups, and no other pass.

A whole norm is carried as `(peak, total)`: it is `unit * total^(1/p)`, and the unit is
the peak, so no power of a norm leaves the range.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.arithmetic import (
    both,
    finite,
    fraction,
    larger,
    more,
    power,
    product,
    smaller,
    total,
    where,
)
from .plan import Ord


def powers(norms: jax.Array, peaks: jax.Array, ord: Ord) -> jax.Array:
    """Each norm in units of the largest, to the power whose sum makes the whole one.

    Each peak is that of a row of norms.
    """
    if ord == float("inf"):
        return norms
    # One over a unit may be too small for a float; four over it is not.
    factors = fraction(4, _unit(peaks))
    each = lax.broadcast_in_dim(factors, norms.shape, tuple(range(factors.ndim)))
    return power(product(lax.mul(norms, each), 0.25), _exponent(ord))


def as_norm(peak: jax.Array, summed: jax.Array, size: object, ord: Ord) -> jax.Array:
    """The norm as a number, of so many entries."""
    if ord == float("inf"):
        return peak
    if ord == "rms":
        summed = summed / jnp.asarray(size, summed.dtype)
    norm = lax.mul(_unit(peak), _root(summed, _exponent(ord)))
    largest = float(jnp.finfo(norm.dtype).max)
    return where(finite(summed), smaller(norm, largest), norm)


def _root(summed: jax.Array, exponent: float) -> jax.Array:
    """The sum to the power of `1 / exponent`, with a derivative of 0 at 0.

    Of a square root the least number makes 0, too: the unit beside it is as small.
    """
    if exponent == 2:
        return lax.sqrt(larger(summed, float(jnp.finfo(summed.dtype).tiny)))
    return power(summed, 1 / exponent)


def _unit(peak: jax.Array) -> jax.Array:
    """The peak, or the nearest number by which can be divided."""
    info = jnp.finfo(peak.dtype)
    return lax.clamp(info.tiny * 4, peak, info.max)


def whole_norm(norms: jax.Array) -> jax.Array:
    """The 2-norm of norms: that of all groups together."""
    peak = jnp.max(norms)
    return as_norm(peak, total(powers(norms, peak, 2.0)), 1, 2.0)


def safe(peak: jax.Array) -> jax.Array:
    """The peak, or 1 where nothing can be divided by it."""
    return where(both(more(peak, 0), finite(peak)), peak, 1)


def _exponent(ord: Ord) -> float:
    return 2.0 if isinstance(ord, str) else ord
