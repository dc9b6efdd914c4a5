"""Arithmetic that stays right near the ends of the range, for complex numbers too."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .types import Dtype, Shaped

Number = jax.Array | np.ndarray | np.number | np.bool_  # NumPy's where a value is known
Operand = Number | bool | int | float  # of the dtype of what it stands beside


def accumulator(arrays: Sequence[Shaped]) -> Any:
    """The dtype of sums, thresholds and scales: float64 if any leaf has it."""
    wide = any(x.dtype in (jnp.float64, jnp.complex128) for x in arrays)
    return jnp.dtype("float64" if wide else "float32")


def at_least_float32(array: Shaped) -> Any:
    """The dtype of what is remembered of an array."""
    return array.dtype if jnp.finfo(array.dtype).bits >= 32 else jnp.float32


# What every update computes is written with `jax.lax`: JAX traces it in a quarter of
# the time that `jax.numpy` takes.


def _of_scalars(traced: Callable[..., Number], known: Callable[..., Number]) -> Any:
    """An operation of `jax.lax`, computed at once where all scalars are known.

    A Python number is of the dtype of what it stands beside.
    """

    def run(*args: ArrayLike) -> Any:
        args = _of_one_dtype(args)
        if all(isinstance(x, np.generic | np.ndarray) for x in args):
            with np.errstate(all="ignore"):
                return known(*args)
        return traced(*args)

    return run


def _of_one_dtype(args: tuple[ArrayLike, ...]) -> tuple[Any, ...]:
    if all(hasattr(x, "dtype") for x in args):
        return args
    dtype = next(x.dtype for x in args if hasattr(x, "dtype"))
    return tuple(x if hasattr(x, "dtype") else np.asarray(x, dtype)[()] for x in args)


equal = _of_scalars(lax.eq, np.equal)
less = _of_scalars(lax.lt, np.less)
at_most = _of_scalars(lax.le, np.less_equal)
plus = _of_scalars(lax.add, np.add)
minus = _of_scalars(lax.sub, np.subtract)
larger = _of_scalars(lax.max, np.maximum)
smaller = _of_scalars(lax.min, np.minimum)
product = _of_scalars(lax.mul, np.multiply)
fraction = _of_scalars(lax.div, np.divide)
negated = _of_scalars(lax.bitwise_not, np.logical_not)
finite = _of_scalars(lax.is_finite, np.isfinite)


def more(x: ArrayLike, y: ArrayLike) -> Any:
    """Whether `x > y`, written as `y < x`: JAX lowers each kind of operation once."""
    return less(y, x)


def at_least(x: ArrayLike, y: ArrayLike) -> Any:
    """Whether `x >= y`."""
    return at_most(y, x)


def either(x: ArrayLike, y: ArrayLike) -> Any:
    """Whether one of two flags is set."""
    for known, other in ((x, y), (y, x)):
        if isinstance(known, np.generic | np.ndarray) and known.shape == ():
            return known if known else other
    return lax.bitwise_or(x, y)


def both(x: ArrayLike, y: ArrayLike) -> Any:
    """Whether both of two flags are set."""
    for known, other in ((x, y), (y, x)):
        if isinstance(known, np.generic | np.ndarray) and known.shape == ():
            return other if known else known
    return lax.bitwise_and(x, y)


def where(mask: Number, x: Operand, y: Operand) -> Any:
    """`jnp.where`, as one operation where neither value is broadcast."""
    shape = getattr(mask, "shape", None)
    like = _one_like(mask, x, y)
    if not (hasattr(like, "dtype") and _fits(x, like) and _fits(y, like)):
        return jnp.where(mask, x, y)
    if like.shape == () and isinstance(mask, jax.Array) and mask.ndim:
        return lax.select(mask, *(lax.full_like(mask, v, like.dtype) for v in (x, y)))
    if shape not in (like.shape, ()):
        return jnp.where(mask, x, y)
    if isinstance(mask, np.generic | np.ndarray) and shape == ():
        return _alike(x if mask else y, like)
    return lax.select(mask, _alike(x, like), _alike(y, like))


def _one_like(mask: Number, x: Operand, y: Operand) -> Any:
    """What has the shape and the dtype of the result."""
    for one, other in ((x, y), (y, x)):
        if isinstance(one, jax.Array) and mask.shape in (one.shape, ()):
            return one if one.ndim or not isinstance(other, jax.Array) else other
    return x if isinstance(x, np.generic) else y


def _fits(x: Operand, like: Number) -> bool:
    """Whether a value is of the same kind, or a number of which there is one."""
    if isinstance(x, bool | int | float):
        return not isinstance(x, float) or jnp.issubdtype(like.dtype, jnp.floating)
    return getattr(x, "shape", None) in (like.shape, ()) and x.dtype == like.dtype


def _alike(x: Operand, like: Number) -> Any:
    if getattr(x, "shape", None) == like.shape:
        return x
    return full_like(like, x)


def full_like(like: Number, x: Operand) -> Any:
    """An array like another, full of a number."""
    if like.shape == () and not isinstance(x, jax.Array):
        return np.asarray(x, like.dtype)
    return lax.full_like(like, x)


def total(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The sum of all entries, or of those along some axes, which are kept."""
    along = tuple(range(x.ndim)) if axes is None else axes
    found = lax.reduce(x, np.zeros((), x.dtype), lax.add, along)
    return found if axes is None else lax.expand_dims(found, axes)


def abs_squared(x: jax.Array) -> jax.Array:
    """The square of a magnitude; of a complex number without taking its root first."""
    if is_complex(x):
        return x.real * x.real + x.imag * x.imag
    return lax.mul(x, x)


def times(x: jax.Array, factor: Number) -> jax.Array:
    """A real or complex array times a real one, part by part."""
    if is_complex(x):
        return lax.complex(times(x.real, factor), times(x.imag, factor))
    return lax.mul(x, factor) if factor.ndim in (0, x.ndim) else x * factor


def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, where `y` may be near the largest number.

    Where it is broadcast, compilers multiply by `1 / y`, which would be flushed to 0.
    """
    most = float(jnp.finfo(y.dtype).max) * 2.0**-28
    small = where(more(y, most), 2.0**-30, y.dtype.type(1))
    return lax.div(lax.mul(x, small), lax.mul(y, small))


def is_concrete(given: PyTree) -> bool:
    """Whether all of this are arrays and numbers that are not traced."""
    kinds = jax.Array | np.ndarray | np.generic | float | int
    return all(
        isinstance(x, kinds) and not isinstance(x, jax.core.Tracer)
        for x in jax.tree.leaves(given)
    )


def is_complex(x: Shaped) -> bool:
    """Whether an array has complex numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.complexfloating))


def widened(x: Shaped, dtype: Dtype) -> Any:
    """The accumulator's dtype, or its complex kin for a complex leaf."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return dtype


def power(x: jax.Array, p: float) -> jax.Array:
    """`x**p` of what is not negative, with a derivative of 0 at 0 for p < 1."""
    if p == 1:
        return x
    if p == 2:
        return lax.mul(x, x)
    # x**p has no derivative at 0 for p < 1.
    positive = more(x, 0)
    base = where(positive, x, 1)
    return where(positive, lax.sqrt(base) if p == 0.5 else base**p, x)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The root, with a derivative of 0 at 0."""
    zero = equal(x, 0)
    return where(zero, 0, lax.sqrt(where(zero, 1, x)))


def hypotenuse(x: jax.Array, y: jax.Array) -> jax.Array:
    """The root of the sum of two squares, of what is not negative."""
    largest = lax.max(x, y)
    ratio = lax.div(lax.min(x, y), where(equal(largest, 0), 1, largest))
    return lax.mul(largest, lax.sqrt(plus(1, lax.mul(ratio, ratio))))


def saturated(root: jax.Array, unit: jax.Array) -> jax.Array:
    """`root * unit`, at most the largest number; what is not finite stays."""
    found = smaller(lax.mul(root, unit), float(jnp.finfo(root.dtype).max))
    return where(lax.is_finite(root), found, root)
