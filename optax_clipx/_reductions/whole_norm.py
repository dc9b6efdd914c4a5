"""The norm of the whole tree from the norms of its groups, and no other pass.

A whole norm is carried as `(peak, total)`: it is `peak * total^(1/p)`, and no power of
a norm leaves the range.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.arithmetic import (
    Number,
    both,
    finite,
    more,
    power,
    product,
    quotient,
    smaller,
    total,
    where,
)
from .plan import Ord

Whole = tuple[jax.Array, jax.Array]


def whole(norms: jax.Array, weights: Number, ord: Ord) -> Whole:
    """The whole norm of an array of norms, each of so many entries or copies."""
    peak = jnp.max(norms)
    if ord == float("inf"):
        return peak, peak
    powers = power(quotient(norms, _safe(peak)), _exponent(ord))
    return peak, total(product(powers, weights))


def combine(peaks: jax.Array, totals: jax.Array, ord: Ord) -> Whole:
    """One whole norm from those of several parts."""
    peak = jnp.max(peaks)
    if ord == float("inf"):
        return peak, peak
    powers = power(quotient(peaks, _safe(peak)), _exponent(ord))
    return peak, jnp.sum(totals * powers)


def as_norm(peak: jax.Array, powers: jax.Array, size: object, ord: Ord) -> jax.Array:
    """The norm as a number, of so many entries."""
    if ord == float("inf"):
        return peak
    if ord == "rms":
        powers = powers / jnp.asarray(size, powers.dtype)
    norm = lax.mul(_safe(peak), power(powers, 1 / _exponent(ord)))
    largest = float(jnp.finfo(norm.dtype).max)
    return where(finite(powers), smaller(norm, largest), norm)


def whole_norm(norms: jax.Array) -> jax.Array:
    """The 2-norm of norms: that of all groups together."""
    return as_norm(*whole(norms, jnp.ones((), norms.dtype), 2.0), 1, 2.0)


def _safe(peak: jax.Array) -> jax.Array:
    return where(both(more(peak, 0), finite(peak)), peak, 1)


def _exponent(ord: Ord) -> float:
    return 2.0 if isinstance(ord, str) else ord
