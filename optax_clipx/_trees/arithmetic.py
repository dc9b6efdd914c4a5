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


def _of_one_dtype(args: tuple[Any, ...]) -> tuple[Any, ...]:
    plain = [type(x) in (bool, int, float) for x in args]  # np.float64 is a float
    if not any(plain):
        return args
    dtype = args[plain.index(False)].dtype
    each = zip(args, plain, strict=True)
    return tuple(np.asarray(x, dtype)[()] if known else x for x, known in each)


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
    """`jnp.where`, as one operation where values have one dtype and shape.

    A Python number is of the dtype of what it stands beside.
    """
    for like in (x, y):
        if not isinstance(like, jax.Array | np.generic | np.ndarray):
            continue
        if mask.shape and mask.shape != like.shape:
            continue
        first, second = _alike(x, like), _alike(y, like)
        if first is None or second is None:
            continue
        if isinstance(mask, np.generic | np.ndarray) and not mask.shape:
            return first if mask else second
        return lax.select(mask, first, second)
    return _of_numbers(mask, x, y)


def _of_numbers(mask: Number, x: Operand, y: Operand) -> Any:
    """An entry of two numbers for each of the mask's, or what `jnp.where` makes."""
    known = np.generic | np.ndarray
    like = x if isinstance(x, known) else y
    if isinstance(mask, jax.Array) and isinstance(like, known):
        pair = _alike(x, like), _alike(y, like)
        if not any(v is None or isinstance(v, jax.Array) for v in pair):
            return lax.select(mask, *(full_like(mask, v, like.dtype) for v in pair))
    return jnp.where(mask, x, y)


def _alike(x: Operand, like: Number) -> Any:
    """The value with the shape of another, or None if it is of another kind."""
    if x is like:
        return x
    if isinstance(x, bool | int | float):
        if isinstance(x, float) and not jnp.issubdtype(like.dtype, jnp.floating):
            return None
        x = np.asarray(x, like.dtype)
    elif x.dtype != like.dtype:
        return None
    if x.shape == like.shape:
        return x
    return None if x.shape else full_like(like, x)


def of_dtype(x: Number, dtype: Dtype) -> Any:
    """A number as one of a dtype; JAX would trace this of a known one, too."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def full_like(like: Number, x: Operand, dtype: Dtype | None = None) -> Any:
    """An array like another, full of a number."""
    if isinstance(x, jax.Array):
        return lax.full_like(like, x, dtype)
    number = np.asarray(x, dtype or like.dtype)
    if not like.shape:
        return number
    if _is_off_mesh(like):  # in half the calls of `lax.full_like`
        return lax.broadcast_in_dim(number, like.shape, ())
    return lax.full_like(like, number, dtype)


def shaped_like(values: PyTree, arrays: PyTree) -> Any:
    """One number, or one of each array, in the form and dtype of the arrays."""
    if not isinstance(values, tuple):
        return jax.tree.map(lambda x: _shaped_like(values, x), arrays)
    return jax.tree.map(_shaped_like, values, arrays)


def _shaped_like(value: ArrayLike, array: Number) -> Any:
    if isinstance(value, float | int):
        return full_like(array, value)
    if isinstance(value, np.ndarray) and value.shape == array.shape:
        return value.astype(array.dtype)
    return jnp.broadcast_to(jnp.asarray(value).astype(array.dtype), array.shape)


def spread_over(like: jax.Array, flags: Number) -> Any:
    """Flags with the shape of an array, unless they are one; and sharded as it is."""
    if not flags.ndim:
        return flags
    if _is_off_mesh(like):
        return lax.broadcast_in_dim(flags, like.shape, tuple(range(flags.ndim)))
    return both(flags, lax.bitwise_or(lax.eq(like, like), np.True_))


def _is_off_mesh(x: Number) -> bool:
    return jax.typeof(x).sharding.mesh.empty


def total(
    x: jax.Array, axes: tuple[int, ...] | None = None, keep: bool = True
) -> jax.Array:
    """The sum of all entries, or of those along some axes, which are kept."""
    along = tuple(range(x.ndim)) if axes is None else axes
    found = lax.reduce_sum(x, along)
    return found if axes is None or not keep else lax.expand_dims(found, axes)


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


def saturated(root: jax.Array, unit: Number) -> jax.Array:
    """`root * unit`, at most the largest number; what is not finite stays."""
    most = larger(root, float(jnp.finfo(root.dtype).max))
    return smaller(lax.mul(root, unit), most)
