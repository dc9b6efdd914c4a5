"""What is computed in another way on each platform, and what it gains there.

Each function is named for what it computes; the platform decides only how. The command
below a function shows what is lost without it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._trees.arithmetic import where
from .mesh import knows_shards
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
    1.7 times as long as with optax's clipping, with joined leaves 1.1 times.
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


def unknown(values: Any) -> Any:
    """The same values, of which the compiler knows nothing.

    So it neither computes them anew for each that uses them, nor puts what it knows of
    them into other arithmetic.
    """
    return lax.optimization_barrier(values)
