"""Gradients of single examples: the forms in which each platform adds them up fast."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._trees.arithmetic import times
from .._trees.types import Arrays
from . import mesh


def in_rows(arrays: Arrays) -> list[Any]:
    """The arrays, computed once; on CPU an example lies in memory as a row."""
    # XLA would give one consumer of a bfloat16 array digits that another does not see,
    # and on CPU compute an array in two layouts and copy it twice (2.5 times as long).
    if any(map(mesh.is_cut, arrays)):
        return lax.optimization_barrier(arrays)

    def flattened(arrays: Arrays) -> list[jax.Array]:
        rows = [x.reshape(x.shape[0], x[:1].size) for x in arrays]
        rows = _stored(lax.optimization_barrier(rows))
        return [row.reshape(x.shape) for row, x in zip(rows, arrays, strict=True)]

    return lax.platform_dependent(
        arrays, cpu=flattened, default=lax.optimization_barrier
    )


def _stored(rows: list[jax.Array]) -> list[Any]:
    """The same rows, in memory if there are any of float16.

    XLA for CPU computes a small gradient anew in the kernel of its norm and in that of
    the sum. A CPU with instructions for float16 rounds it in other places in each, and
    an example passes its limit by 3e-5. What goes into a branch is stored.

    `python -m pytest tests/per_example -k rounded_once`
    """
    narrow = [row for row in rows if row.dtype == jnp.float16 and row.size]
    if not narrow:
        return rows
    number = narrow[0][0, 0]
    # Of two branches that are the same XLA makes none.
    return lax.cond(
        number == number, lambda: rows, lambda: lax.optimization_barrier(rows)
    )


def weighted_sums(
    arrays: Arrays,
    keeps: Arrays,
    coarse: Arrays,
    fine: Arrays,
    usual: jax.Array,
) -> list[jax.Array]:
    """The sums over the examples of what is kept, times two factors.

    `usual` says that all are kept and that no coarse factor differs from 1.
    """
    parts = (arrays, keeps, coarse, fine)

    def sums(*parts: Arrays) -> list[jax.Array]:
        each = zip(*parts, strict=True)
        return [
            jnp.sum(jnp.where(k, times(times(x, c), f), 0), axis=0)
            for x, k, c, f in each
        ]

    # On CPU a sum along the first axis takes up to 80 times as long as a product of a
    # vector and a matrix, but there 0 times NaN is NaN.
    def products(
        arrays: Arrays,
        keeps: Arrays,
        coarse: Arrays,
        fine: Arrays,
    ) -> list[jax.Array]:
        weights = [jnp.where(k, f, 0) for k, f in zip(keeps, fine, strict=True)]
        arrays = _cleaned(arrays, usual, keeps, coarse)
        return list(map(_product, weights, arrays))

    if any(mesh.is_cut(x) or jnp.iscomplexobj(x) for x in arrays):
        return sums(*parts)
    return lax.platform_dependent(*parts, cpu=products, default=sums)


@jax.custom_jvp
def _cleaned(
    arrays: Arrays,
    usual: jax.Array,
    keeps: Arrays,
    coarse: Arrays,
) -> Any:
    """The arrays, and if they are not usual, scaled coarsely and rid of the rest."""

    # A loop of no or one turn changes what it carries where it lies. A cond keeps room
    # for a second copy: 154 MB beside gradients of 77 MB.
    def turn(state: PyTree) -> Any:
        return state[0] | True, _clean(state[1], keeps, coarse)

    return lax.while_loop(lambda state: ~state[0], turn, (usual, arrays))[1]


@_cleaned.defjvp
def _cleaned_jvp(primals: PyTree, tangents: PyTree) -> Any:
    # Loops cannot be differentiated backward. The factors are constants.
    _, _, keeps, coarse = primals
    return _cleaned(*primals), _clean(tangents[0], keeps, coarse)


def _clean(arrays: Arrays, keeps: Arrays, coarse: Arrays) -> list[jax.Array]:
    each = zip(arrays, keeps, coarse, strict=True)
    return [jnp.where(k, times(x, c), 0) for x, k, c in each]


def _product(weights: jax.Array, array: jax.Array) -> jax.Array:
    return jnp.tensordot(weights.reshape(-1), array, 1, precision="highest")
