"""What is computed in another way on each platform, and what it gains there.

Each function is named for what it computes; the platform decides only how. The command
below a function shows what is lost without it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._trees.types import Arrays
from .mesh import knows_shards
from .numbers import is_inside
from .platforms import Ways, by_platform


def traced_once(fun: Callable[..., PyTree], static: tuple[int, ...] = ()) -> Any:
    """A function of one leaf, traced and lowered once for all leaves of a shape.

    With Auto axes a call would hide from XLA how best to lay out what is computed.

    `python benchmarks/everyday.py`: without it AGC on 50 leaves is traced 8 times as
    long.
    """
    called = jax.jit(fun, static_argnums=static)
    inlined = jax.jit(fun, static_argnums=static, inline=True)

    @functools.wraps(fun)
    def run(first: PyTree, *others: PyTree) -> Any:
        return (called if knows_shards(first) else inlined)(first, *others)

    return run


class Passes(NamedTuple):
    """What a first pass over arrays finds, or a second one if it is needed.

    `first(given)` is what it found, what a second pass goes by, and whether that is
    needed; `again(found, by, given)` is what the second one finds.
    `side_by_side(given)` is the right one of both and what it went by, from one read.
    """

    first: Callable[[Any], tuple[Any, Any, jax.Array]]
    again: Callable[[Any, Any, Any], Any]
    side_by_side: Callable[[Any], tuple[Any, Any]]


class Joined(NamedTuple):
    """Passes over small leaves put together, and what puts them together."""

    together: Callable[[Any], Any]
    passes: Passes


def if_needed(
    passes: Passes, joined: Joined, given: PyTree, like: PyTree = None
) -> tuple[Any, Any]:
    """What a first pass finds, or a second one if it is needed; and what it goes by.

    On CPU each sum over a leaf is a pass of its own, and the second one runs only if it
    is needed. Accelerators compute all side by side, without a branch. `joined` does
    the same with small leaves put together, of which a TPU would store the copy in HBM.
    `like` says what the results are like, if it is known.

    `python benchmarks/steps.py`: a second pass on CPU is 0.2 of a step of Adam.
    `python benchmarks/pod.py`: a branch on TPU costs 16% of the bytes.
    `python benchmarks/everyday.py`: leaf by leaf a step of Adam on 50 leaves compiles
    1.7 times as long as with optax's clipping, with joined leaves 1.1 times.
    """

    def on_cpu(given: PyTree) -> tuple[Any, Any]:
        parts = joined.together(given)
        found, by, needed = joined.passes.first(parts)
        again = functools.partial(joined.passes.again, found, by, parts)
        return lax.cond(needed, again, lambda: found), by

    def in_one(given: PyTree) -> tuple[Any, Any]:
        return joined.passes.side_by_side(joined.together(given))

    ways = Ways(cpu=on_cpu, tpu=passes.side_by_side, others=in_one)
    return by_platform(ways, given, like)


def _at(
    places: Sequence[ArrayLike], sizes: tuple[int, ...], vector: jax.Array
) -> list[jax.Array]:
    each = zip(places, sizes, strict=True)
    return [lax.dynamic_slice(vector, (place,), (size,)) for place, size in each]


def _cut_at_unknown_places(sizes: tuple[int, ...], vector: jax.Array) -> Any:
    def places() -> Any:
        starts = [0, *itertools.accumulate(sizes)][:-1]
        return tuple(map(np.uint32, starts))

    first = lax.index_in_dim(vector, 0, keepdims=False)
    return _at(lax.cond(lax.is_finite(first), places, places), sizes, vector)


def _cut(sizes: tuple[int, ...], vector: jax.Array) -> Any:
    return lax.split(vector, sizes)


def cut(vector: jax.Array, sizes: tuple[int, ...]) -> Arrays:
    """The parts of a vector, one after the other.

    XLA for CPU compiles a kernel of its own for each part whose place it knows, and for
    all that uses it. It learns the places from a branch, and compiles one for all parts
    of a size.

    `python benchmarks/everyday.py`: without it a step of Adam on 4 leaves compiles 1.25
    times as long.
    """
    if is_inside():
        return lax.split(vector, sizes)
    on_cpu = functools.partial(_cut_at_unknown_places, sizes)
    plain = functools.partial(_cut, sizes)
    like = [jax.ShapeDtypeStruct((size,), vector.dtype) for size in sizes]
    return by_platform(Ways(on_cpu, plain, plain), vector, like)


def entries(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector, as scalars."""
    return [lax.squeeze(x, (0,)) for x in cut(vector, (1,) * vector.shape[0])]


def unknown(values: PyTree) -> Any:
    """The same values, of which the compiler knows nothing.

    So it neither computes them anew for each that uses them, nor puts what it knows of
    them into other arithmetic.
    """
    return lax.optimization_barrier(values)
