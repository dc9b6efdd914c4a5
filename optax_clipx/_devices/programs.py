"""What is computed in another way on each platform, and what it gains there.

Each function is named for what it computes; the platform decides only how. The command
below a function shows what is lost without it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._trees.arithmetic import total, where
from .._trees.sizes import is_known
from .mesh import knows_shards, vary, varying
from .numbers import is_inside


def traced_once(fun: Callable[..., Any], static: tuple[int, ...] = ()) -> Any:
    """A function of one leaf, traced and lowered once for all leaves of a shape.

    With Auto axes a call would hide from XLA how best to lay out what is computed.

    `python benchmarks/everyday.py`: without it AGC on 50 leaves is traced 8 times as
    long.
    """
    called = jax.jit(fun, static_argnums=static)
    inlined = jax.jit(fun, static_argnums=static, inline=True)

    @functools.wraps(fun)
    def run(first: Any, *others: Any) -> Any:
        return (called if knows_shards(first) else inlined)(first, *others)

    return run


class Passes(NamedTuple):
    """What is found in a first pass over arrays, and in a second if it is needed.

    `once(given)` is what a first pass finds, whether more is needed, and what
    `again(more, given)` needs besides. `side_by_side(given)` computes all that may be
    needed in one read.
    """

    once: Callable[[Any], Any]
    again: Callable[[Any, Any], Any]
    side_by_side: Callable[[Any], Any]


def if_needed(passes: Passes, joined: Passes, given: Any) -> Any:
    """What a first pass finds, or a second one if the first says that it is needed.

    On CPU each sum over a leaf is a pass of its own, and the second one runs only if it
    is needed. Accelerators compute all side by side, without a branch. `joined` does
    the same with small leaves put together, of which a TPU would store the copy in HBM.

    `python benchmarks/steps.py`: a second pass on CPU is 0.2 of a step of Adam.
    `python benchmarks/pod.py`: a branch on TPU costs 16% of the bytes.
    `python benchmarks/everyday.py`: leaf by leaf a step of Adam on 50 leaves compiles
    1.7 times as long as with optax's clipping, joined as long.
    """

    def on_cpu(given: Any) -> Any:
        found, needed, more = joined.once(given)
        return lax.cond(
            needed,
            lambda found, more, given: joined.again(more, given),
            lambda found, more, given: found,
            found,
            more,
            given,
        )

    if joined is passes:
        return lax.platform_dependent(given, cpu=on_cpu, default=passes.side_by_side)
    return lax.platform_dependent(
        given, cpu=on_cpu, tpu=passes.side_by_side, default=joined.side_by_side
    )


def together(arrays: Sequence[jax.Array | np.ndarray]) -> Any:
    """The entries of arrays as one vector.

    On CPU it is stored: a sum would look for the array of each entry.
    """
    if len(arrays) == 1:
        return arrays[0]
    vector = lax.concatenate([lax.reshape(x, (x.size,)) for x in arrays], 0)
    return lax.platform_dependent(
        vector, cpu=lax.optimization_barrier, default=lambda x: x
    )


def _replaced_once(flag: Any, value: Any, arrays: Any) -> Any:
    def replaced(value: jax.Array, arrays: Any) -> Any:
        # Made from the arrays, so that it lies on the mesh as they do.
        return jax.tree.map(lambda x: jnp.where(x == x, value, value), arrays)

    def everywhere(flag: jax.Array, value: jax.Array, arrays: Any) -> Any:
        return jax.tree.map(lambda x: jnp.where(flag, value, x), arrays)

    def on_cpu(flag: jax.Array, value: jax.Array, arrays: Any) -> Any:
        return lax.cond(flag, replaced, lambda value, arrays: arrays, value, arrays)

    return lax.platform_dependent(flag, value, arrays, cpu=on_cpu, default=everywhere)


_replaced = traced_once(_replaced_once)


def replaced_if(flag: Any, value: Any, arrays: Any) -> Any:
    """Arrays full of a value if the flag is set, else as they are, computed once.

    XLA for CPU would compute anew in the loop of every leaf what led to its scale, but
    what comes out of a branch is there already.

    `python benchmarks/everyday.py`: AGC.
    """
    if is_inside():
        return jax.tree.map(lambda x: where(flag, value, x), arrays)
    return _replaced(flag, value, arrays)


def _cut_once(vector: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """The same.

    XLA for CPU compiles a kernel of its own for each part whose place it knows, and for
    all that uses it. It learns the places from a branch, and compiles one for all parts
    of a size.

    `python benchmarks/everyday.py`: without it a step of Adam on 4 leaves compiles 1.25
    times as long.
    """
    starts = [0, *itertools.accumulate(sizes)][:-1]
    places = tuple(map(np.uint32, starts))

    def known() -> Any:
        return places

    def unknown(vector: jax.Array) -> Any:
        first = lax.index_in_dim(vector, 0, keepdims=False)
        return lax.cond(lax.is_finite(first), known, known)

    found = lax.platform_dependent(vector, cpu=unknown, default=lambda vector: known())
    each = zip(found, sizes, strict=True)
    return [lax.dynamic_slice(vector, (place,), (size,)) for place, size in each]


_cut = traced_once(_cut_once, (1,))


def cut(vector: jax.Array, sizes: tuple[int, ...]) -> Sequence[jax.Array]:
    """The parts of a vector, one after the other."""
    return lax.split(vector, sizes) if is_inside() else _cut(vector, sizes)


def entries(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector, as scalars."""
    return [lax.squeeze(x, (0,)) for x in cut(vector, (1,) * vector.shape[0])]


def vector_of(scalars: Sequence[jax.Array]) -> jax.Array:
    """Scalars as a vector."""
    return lax.concatenate([lax.reshape(x, (1,)) for x in scalars], 0)


def total_of(scalars: Sequence[jax.Array]) -> jax.Array:
    """The sum of scalars, or of arrays of one shape."""
    if len(scalars) <= 32:
        return functools.reduce(lax.add, scalars)
    return jnp.sum(stacked(scalars), axis=0)


def stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays of one shape as one.

    Of what is then summed XLA for CPU would make one loop over all arrays, and to put
    that together takes it a time that grows with the square of their number.

    `python benchmarks/compiling.py`: 1,000 leaves.
    """
    together = jnp.stack(arrays) if arrays[0].ndim else vector_of(arrays)
    if len(arrays) <= 2 or is_inside():
        return together
    return lax.platform_dependent(
        together, cpu=lax.optimization_barrier, default=lambda x: x
    )


def sum_on_cpu(
    values: Callable[[jax.Array], jax.Array],
    leaf: jax.Array,
    axes: tuple[int, ...] | None,
    sums: Any,
) -> jax.Array:
    """The sum of the values of a leaf's entries, over some axes that are kept, or all.

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
    if axes is None:
        return total(values(leaf))
    return jnp.sum(values(leaf), axis=axes, keepdims=True)


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
    values: Callable[..., list[jax.Array]], arrays: Sequence[jax.Array], others: Any
) -> list[jax.Array]:
    """The sums of `values(*arrays, others)`, all of them in one read; on CPU alone.

    XLA for CPU writes out what is computed before it is summed: 75 ms for 200 MB and
    their clamp, of which a read takes 7. In a loop over parts that stay in the cache it
    takes 14. For smaller arrays compiling the loop costs more than it saves.

    `python benchmarks/steps.py`: `clip` on the large trees.
    """
    size, part = arrays[0].size, 2**16
    flat = [lax.reshape(x, (size,)) for x in arrays]

    def add(i: Any, sums: list[jax.Array]) -> list[jax.Array]:
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
