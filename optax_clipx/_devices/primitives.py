"""A function as a primitive of JAX, whose lowering may differ by platform."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.typing import ArrayLike
from jaxtyping import PyTree


def primitive_of(
    name: str,
    run: Callable[..., Sequence[object]],
    types: Callable[..., Sequence[object]],
) -> Primitive:
    """A primitive that is evaluated, differentiated and mapped as `run(*arrays)` is.

    `types(*arrays)` are the types of its results. What is static is passed to both by
    name. How it is lowered is left to say.
    """

    def slope(
        given: Sequence[ArrayLike], changes: Sequence[PyTree], **static: object
    ) -> Any:
        fun = functools.partial(run, **static)
        arrays = [jnp.asarray(x) for x in given]  # JAX 0.7 gives numbers of Python
        moved = [_as_jvp_wants_it(*x) for x in zip(arrays, changes, strict=True)]
        found, slopes = jax.jvp(fun, tuple(arrays), tuple(moved))
        return found, [_or_zero(*x) for x in zip(found, slopes, strict=True)]

    def over_a_batch(
        arrays: Sequence[ArrayLike], axes: Sequence[int | None], **static: object
    ) -> Any:
        fun = functools.partial(run, **static)
        found = jax.vmap(fun, in_axes=tuple(axes))(*arrays)
        return found, [0] * len(found)

    made = Primitive(f"optax_clipx_{name}")
    made.multiple_results = True
    made.def_impl(run)
    made.def_abstract_eval(types)
    ad.primitive_jvps[made] = slope
    batching.primitive_batchers[made] = over_a_batch
    return made


def _as_jvp_wants_it(x: jax.Array, change: jax.Array | ad.Zero) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return ad.instantiate_zeros(change)
    return np.zeros(x.shape, jax.dtypes.float0)


def _or_zero(x: jax.Array, slope: jax.Array | np.ndarray) -> Any:
    if slope.dtype == jax.dtypes.float0:
        return ad.Zero(jax.typeof(x).to_tangent_aval())
    return slope
