"""Arithmetic that stays right near the ends of the range, for complex numbers too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def accumulator(arrays: Sequence[Any]) -> Any:
    """The dtype of sums, thresholds and scales: float64 if any leaf has it."""
    wide = any(x.dtype in (jnp.float64, jnp.complex128) for x in arrays)
    return jnp.dtype("float64" if wide else "float32")


def at_least_float32(array: Any) -> Any:
    """The dtype of what is remembered of an array."""
    return array.dtype if jnp.finfo(array.dtype).bits >= 32 else jnp.float32


# What every update computes is written with `jax.lax`: JAX traces it in a quarter of
# the time that `jax.numpy` takes.


def where(mask: Any, x: Any, y: Any) -> jax.Array:
    """`jnp.where` of arrays of one shape, one of which may be a number."""
    like = x if getattr(x, "shape", None) == mask.shape and hasattr(x, "aval") else y
    return lax.select(mask, _alike(x, like), _alike(y, like))


def _alike(x: Any, like: Any) -> Any:
    if getattr(x, "shape", None) == like.shape and x.dtype == like.dtype:
        return x
    return full_like(like, x)


def full_like(like: Any, x: Any) -> Any:
    """An array like another, full of a number."""
    if like.shape == () and not isinstance(x, jax.Array):
        return np.asarray(x, like.dtype)
    return lax.full_like(like, x)


def total(x: jax.Array) -> jax.Array:
    """The sum of all entries."""
    return lax.reduce(x, np.zeros((), x.dtype), lax.add, tuple(range(x.ndim)))


def abs_squared(x: jax.Array) -> jax.Array:
    """The square of a magnitude; of a complex number without taking its root first."""
    if is_complex(x):
        return x.real * x.real + x.imag * x.imag
    return lax.mul(x, x)


def times(x: Any, factor: jax.Array | np.ndarray) -> jax.Array:
    """A real or complex array times a real one, part by part."""
    if is_complex(x):
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor if x.shape != np.shape(factor) else lax.mul(x, factor)


def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, where `y` may be near the largest number.

    Where it is broadcast, XLA multiplies by `1 / y`, which then would be flushed to 0.
    """
    small = jnp.where(y > jnp.finfo(y.dtype).max * 2.0**-28, 2.0**-30, 1)
    small = small.astype(y.dtype)
    return (x * small) / (y * small)


def is_concrete(given: Any) -> bool:
    """Whether all of this are arrays and numbers that are not traced."""
    kinds = jax.Array | np.ndarray | np.generic | float | int
    return all(
        isinstance(x, kinds) and not isinstance(x, jax.core.Tracer)
        for x in jax.tree.leaves(given)
    )


def is_complex(x: Any) -> bool:
    """Whether an array has complex numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.complexfloating))


def widened(x: Any, dtype: Any) -> Any:
    """The accumulator's dtype, or its complex kin for a complex leaf."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return dtype


def power(x: jax.Array, p: float) -> jax.Array:
    """`x**p` of what is not negative, with a derivative of 0 at 0 for p < 1."""
    if p == 1:
        return x
    if p == 2:
        return jnp.square(x)
    positive = x > 0
    # x**p has no derivative at 0 for p < 1.
    return jnp.where(positive, jnp.where(positive, x, 1) ** p, x)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The root, with a derivative of 0 at 0."""
    zero = lax.eq(x, full_like(x, 0))
    return where(zero, 0, lax.sqrt(where(zero, 1, x)))


def saturated_quotient(root: jax.Array, factor: jax.Array) -> jax.Array:
    """`root / factor`, at most the largest number; what is not finite stays."""
    largest = jnp.finfo(root.dtype).max
    finite = jnp.isfinite(root)
    return jnp.where(finite, jnp.minimum(root / factor, largest), root)


def clamp_to_one(x: jax.Array) -> jax.Array:
    """Entries between -1 and 1; of a complex number each of its parts."""
    if jnp.iscomplexobj(x):
        return lax.complex(jnp.clip(x.real, -1, 1), jnp.clip(x.imag, -1, 1))
    return jnp.clip(x, -1, 1)
