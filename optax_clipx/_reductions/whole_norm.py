"""The norm of the whole tree from the norms of its groups, and no other pass."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._trees.arithmetic import power, quotient
from .groups import Packed
from .norms import Ord


def whole(
    norms: Packed, sizes: Packed, ord: Ord, weights: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """`(peak, total)` of packed norms, from which `combine` makes the whole norm."""
    leaves = jax.tree.leaves(norms)
    peak = jnp.max(jnp.stack([jnp.max(n) for n in leaves]))
    safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    if ord == float("inf"):
        return peak, peak
    terms = []
    for n, size, weight in zip(leaves, jax.tree.leaves(sizes), weights, strict=True):
        known = np.asarray(size) if not isinstance(size, jax.Array) else size
        factor = known * weight if ord == "rms" else weight
        powers = power(quotient(n, safe), _exponent(ord))
        terms.append(jnp.sum(powers * jnp.asarray(factor, n.dtype)))
    return peak, jnp.sum(jnp.stack(terms))


def whole_norm(norms: jax.Array) -> jax.Array:
    """The 2-norm of norms: that of all groups together."""
    peak, total = whole(norms, jnp.zeros(norms.shape), 2.0, [1.0])
    return combine(peak[None], total[None], 1, 2.0)


def combine(peaks: jax.Array, totals: jax.Array, size: Any, ord: Ord) -> jax.Array:
    """The whole norm from vectors of peaks and totals."""
    peak = jnp.max(peaks)
    if ord == float("inf"):
        return peak
    exponent = _exponent(ord)
    safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    total = jnp.sum(totals * power(quotient(peaks, safe), exponent))
    if ord == "rms":
        total = total / jnp.asarray(size, total.dtype)
    norm = safe * power(total, 1 / exponent)
    largest = jnp.finfo(norm.dtype).max
    return jnp.where(jnp.isfinite(total), jnp.minimum(norm, largest), norm)


def _exponent(ord: Ord) -> float:
    return 2.0 if isinstance(ord, str) else ord
