"""Sums over arrays, in the form that each platform computes fast.

Each function is named for what it computes; the platform decides only how. The command
below a function shows what is lost without it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from .._trees.arithmetic import total
from .._trees.sizes import is_known
from .._trees.types import Arrays, Dtype
from .mesh import knows_shards, vary, varying
from .numbers import is_inside
from .platforms import stored_on_cpu


def together(arrays: Sequence[jax.Array | np.ndarray]) -> Any:
    """The entries of arrays as one vector.

    On CPU it is stored: a sum would look for the array of each entry.
    """
    if len(arrays) == 1:
        return arrays[0]
    return stored_on_cpu(
        lax.concatenate([lax.reshape(x, (x.size,)) for x in arrays], 0)
    )


def vector_of(scalars: Arrays) -> jax.Array:
    """Scalars as a vector."""
    return lax.concatenate([lax.reshape(x, (1,)) for x in scalars], 0)


def total_of(scalars: Arrays) -> jax.Array:
    """The sum of scalars, or of arrays of one shape."""
    if len(scalars) <= 32:
        return functools.reduce(lax.add, scalars)
    return jnp.sum(stacked(scalars), axis=0)


def stacked(arrays: Arrays) -> jax.Array:
    """Arrays of one shape as one.

    Of what is then summed XLA for CPU would make one loop over all arrays, and to put
    that together takes it a time that grows with the square of their number.

    `python benchmarks/compiling.py`: 1,000 leaves.
    """
    together = jnp.stack(arrays) if arrays[0].ndim else vector_of(arrays)
    if len(arrays) <= 2 or is_inside():
        return together
    return stored_on_cpu(together)


def sum_of(
    values: Callable[[jax.Array], jax.Array],
    leaf: jax.Array,
    axes: tuple[int, ...] | None,
    sums: Dtype,
    keep: bool = True,
) -> jax.Array:
    """The sum of the values of a leaf's entries, over all axes, or some that are kept.

    Without `keep` they may be left out.

    XLA for CPU sums a small array of several dimensions entry by entry: of 2,304 equal
    ones the sum is off by 3e-5 of itself. A vector it sums in parts of 32. Of a leaf
    narrower than its sums it would store a wide copy, for the sum and the scaling. And
    for a sum over few leading axes, of experts for example, it takes 30 times as long
    as for adding row to row.

    `python -m pytest tests/trees/test_arithmetic.py tests/clipping/test_cost.py`
    """
    if jnp.finfo(leaf.dtype).bits < jnp.finfo(sums).bits:
        leaf = lax.optimization_barrier(leaf)
    elif axes is None and leaf.ndim > 1 and is_known(leaf.size):
        if leaf.size <= 2**13 and knows_shards(leaf):
            # Behind a barrier, or XLA takes the sum of what was reshaped.
            leaf = lax.optimization_barrier(lax.reshape(leaf, (leaf.size,)))
    elif axes is not None and _has_few_long_rows(leaf, axes):
        return _added_by_rows(values, leaf, axes)
    return total(values(leaf), axes, keep)


def _has_few_long_rows(leaf: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether the leading axes are summed over, and what is kept is long."""
    if not is_known(leaf.size):
        return False
    rows = math.prod(leaf.shape[a] for a in axes)
    leading = axes == tuple(range(len(axes)))
    long = leaf.size >= rows * 2**16
    return leading and long and 1 < rows <= 64 and knows_shards(leaf)


def _added_by_rows(
    values: Callable[[jax.Array], jax.Array], leaf: jax.Array, axes: tuple[int, ...]
) -> jax.Array:
    kept = tuple(1 if i in axes else n for i, n in enumerate(leaf.shape))
    rows = lax.reshape(leaf, (leaf.size,)).reshape(-1, *kept)
    found = values(rows[0])
    for i in range(1, rows.shape[0]):
        found = found + values(rows[i])
        if i % 16 == 0:  # what one loop holds is bounded
            found = lax.optimization_barrier(found)
    return found


def sums_by_parts(
    values: Callable[..., list[jax.Array]], arrays: Arrays, others: PyTree
) -> list[jax.Array]:
    """The sums of `values(*arrays, others)`, all of them in one read; on CPU alone.

    XLA for CPU writes out what is computed before it is summed: 75 ms for 200 MB and
    their clamp, of which a read takes 7. In a loop over parts that stay in the cache it
    takes 14. For smaller arrays compiling the loop costs more than it saves.

    `python benchmarks/steps.py`: `clip` on the large trees.
    """
    size, part = arrays[0].size, 2**16
    flat = [lax.reshape(x, (size,)) for x in arrays]

    def add(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        start = jnp.minimum(i * part, size - part)
        found = values(*[lax.dynamic_slice(x, (start,), (part,)) for x in flat], others)
        if size % part:  # the last part begins within the one before
            new = lax.iota(jnp.int32, part) >= i * part - start
            found = [jnp.where(new, x, 0) for x in found]
        return list(map(jnp.add, sums, found))

    first = values(*[x[:part] for x in flat], others)  # for its types alone
    zeros = [vary(jnp.zeros(x.shape, x.dtype), tuple(varying(x))) for x in first]
    sums = lax.fori_loop(0, -(-size // part), add, zeros)
    return list(map(jnp.sum, sums))


def sums_in_one(
    values: Sequence[Arrays], axes: tuple[int, ...] | None, most: int
) -> list[list[jax.Array]]:
    """The sums of arrays of one shape, from one reduction if they are small.

    Over some axes that are kept, or over all.

    XLA for GPU compiles a kernel for each of several sums, and one more for what its
    blocks found. Here each array is a row of one. What they are made of is read once
    for each row; small arrays are in the cache then.

    `python benchmarks/everyday.py --h100`: with it a step of Adam on 12 leaves has 17
    kernels with `clip` and 25 with AGC, without it 26 and 49.
    """
    each = [x for row in values for x in row]
    if not is_known(each[0].size) or each[0].size > most:
        return [[total(x, axes) for x in row] for row in values]
    table = lax.concatenate([lax.expand_dims(x, (0,)) for x in each], 0)
    if axes is None:
        sums = _of_long_rows(lax.reshape(table, (len(each), each[0].size)))
    else:
        sums = total(table, tuple(1 + axis for axis in axes))
    found = iter(lax.index_in_dim(sums, i, keepdims=False) for i in range(len(each)))
    return [[next(found) for _ in row] for row in values]


def _of_long_rows(rows: jax.Array) -> jax.Array:
    """The sum of each row.

    Of more than 2^14 entries XLA for GPU makes a reduction and a second one. Here the
    first one sums parts, and adding them up is no kernel of its own. It must not know
    where the parts are from, or it makes one sum of both.
    """
    count, size = rows.shape
    parts = -(-size // 2**14)
    if parts == 1:
        return lax.reshape(total(rows, (1,)), (count,))
    filled = ((0, 0, 0), (0, -size % parts, 0))
    rows = lax.pad(rows, np.zeros((), rows.dtype), filled)
    rows = lax.reshape(rows, (count, parts, rows.shape[1] // parts))
    columns = lax.split(lax.optimization_barrier(total(rows, (2,))), [1] * parts, 1)
    return lax.reshape(functools.reduce(lax.add, columns), (count,))


def in_one_vector(rows: Sequence[Arrays]) -> list[jax.Array]:
    """The entries of each row's arrays as a vector, all of them parts of one.

    XLA for GPU compiles a kernel for each vector that is put together. It must not know
    what the parts are made of, or it puts each together by itself.

    `python benchmarks/everyday.py --h100`: with it a step of Adam on 4 leaves has 16
    kernels with AGC, without it 19.
    """
    each = [lax.reshape(x, (x.size,)) for row in rows for x in row]
    vector = lax.optimization_barrier(lax.concatenate(each, 0))
    return list(lax.split(vector, [sum(x.size for x in row) for row in rows]))


def outside(array: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """1 for each entry outside of its bounds, else 0.

    On CPU the sum of a comparison takes three times as long as that of this sign.
    """
    if jnp.iscomplexobj(array):
        array = jnp.abs(array)
    wide, inside = (
        lax.convert_element_type(x, high.dtype)
        for x in (array, clamped(array, low, high))
    )
    return lax.sign(lax.abs(lax.sub(wide, inside)))


def clamped(array: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The clamp in a form that XLA does not turn into its clamp operation.

    Inside of a reduction on CPU that one takes eight times as long.
    """
    low, high = (lax.convert_element_type(x, array.dtype) for x in (low, high))
    return lax.neg(lax.max(lax.neg(lax.max(array, low)), lax.neg(high)))
