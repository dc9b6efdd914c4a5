"""What is computed in another way on each platform, and what it gains there.

Each function is named for what it computes; the platform decides only how. The command
below a function shows what is lost without it.
"""

import functools
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as hlo
from jaxtyping import PyTree

from .._trees.arithmetic import is_concrete
from .._trees.types import Arrays, Shaped
from .mesh import knows_shards
from .numbers import is_inside
from .platforms import Ways, by_platform, is_on_mesh
from .primitives import primitive_of


class TracedOnce:
    """A function of one leaf, traced and lowered once for all leaves of a shape.

    With Auto axes a call would hide from XLA how best to lay out what is computed.

    `python benchmarks/everyday.py`: without it AGC on 50 leaves is traced 8 times as
    long.
    """

    FEW = 8  # leaves

    def __init__(self, fun: Callable[..., PyTree], static: tuple[int, ...] = ()):
        self._fun = fun
        self._called = jax.jit(fun, static_argnums=static)
        self._inlined = jax.jit(fun, static_argnums=static, inline=True)

    def __call__(self, first: PyTree, *others: PyTree) -> Any:
        """What the function makes of one leaf."""
        called = self._called if knows_shards(first) else self._inlined
        return called(first, *others)

    def each(self, leaves: Iterable[tuple[Any, ...]]) -> list[Any]:
        """What the function makes of each leaf, given with its other arguments.

        Few are traced one by one: a call takes as many calls of Python as five
        operations (`python -m pytest -m slow tests/project/test_trace_calls.py`).
        """
        every = list(leaves)
        traced = bool(every) and not is_concrete(every[0][0])
        run = self._fun if traced and len(every) <= self.FEW else self
        return [run(*leaf) for leaf in every]


class Passes(NamedTuple):
    """What a first pass over arrays finds, or a second one if it is needed.

    `first(given)` is what it found, and whether a second pass is needed;
    `again(found, given)` is what the second one finds, and `side_by_side(given)` the
    right one of both, from one read.
    """

    first: Callable[[Any], tuple[Any, jax.Array]]
    again: Callable[[Any, Any], Any]
    side_by_side: Callable[[Any], Any]


class Joined(NamedTuple):
    """Passes over small leaves put together, and what puts them together."""

    together: Callable[[Any], Any]
    passes: Passes


def if_needed(
    passes: Passes, joined: Joined, given: PyTree, like: PyTree = None
) -> Any:
    """What a first pass finds, or a second one if it is needed.

    On CPU each sum over a leaf is a pass of its own, and the second one runs only if it
    is needed. Accelerators compute all side by side, without a branch. `joined` does
    the same with small leaves put together, of which a TPU would store the copy in HBM.
    `like` says what the results are like, if it is known.

    `python benchmarks/steps.py`: a second pass on CPU is 0.2 of a step of Adam.
    `python benchmarks/pod.py`: a branch on TPU costs 16% of the bytes.
    `python benchmarks/everyday.py`: leaf by leaf a step of Adam on 50 leaves compiles
    1.7 times as long as with optax's clipping, with joined leaves 1.1 times.
    """

    def on_cpu(given: PyTree) -> Any:
        parts = joined.together(given)
        found, needed = joined.passes.first(parts)
        again = functools.partial(joined.passes.again, found, parts)
        return lax.cond(needed, again, lambda: found)

    def in_one(given: PyTree) -> Any:
        return joined.passes.side_by_side(joined.together(given))

    ways = Ways(cpu=on_cpu, tpu=passes.side_by_side, others=in_one)
    return by_platform(ways, given, like)


def cut(vector: jax.Array, sizes: tuple[int, ...]) -> Arrays:
    """The parts of a vector, one after the other.

    XLA for CPU compiles a kernel of its own for each part whose place it knows, and for
    all that uses it. It learns the places from a branch, and compiles one for all parts
    of a size.

    `python benchmarks/everyday.py`: without it a step of Adam with AGC on 50 leaves
    compiles 2.4 times as long.
    """
    if is_inside() or is_on_mesh([vector]) or is_concrete(vector):
        return lax.split(vector, sizes)
    return _cut.bind(vector, sizes=sizes)


def _split(vector: jax.Array, *, sizes: tuple[int, ...]) -> Any:
    return lax.split(vector, sizes)


def _types(vector: Shaped, *, sizes: tuple[int, ...]) -> list[Any]:
    return [jax.core.ShapedArray((size,), vector.dtype) for size in sizes]


def _lowered_on_cpu(
    context: mlir.LoweringRuleContext, vector: Any, *, sizes: tuple[int, ...]
) -> list[Any]:
    """Written as XLA's own operations, since it is lowered once for each vector.

    `python -m pytest -m slow tests/project/test_trace_calls.py`: traced, it took 6% of
    the calls of AGC on 4 leaves.
    """
    starts = [np.uint32(i) for i in accumulate((0, *sizes[:-1]))]
    start, end = (mlir.dense_int_array([i]) for i in range(2))
    scalar = ir.RankedTensorType.get((), vector.type.element_type)
    first = hlo.reshape(scalar, hlo.slice(vector, start, end, end))
    place, number = (_scalar_of(x) for x in (np.uint32, np.int32))
    branches = hlo.CaseOp(
        [place] * len(sizes), hlo.convert(number, hlo.is_finite(first)), 2
    )
    for region in branches.regions:
        with ir.InsertionPoint(region.blocks.append()):
            hlo.return_(list(map(mlir.ir_constant, starts)))
    return [
        hlo.dynamic_slice(vector, [place], mlir.dense_int_array([size]))
        for place, size in zip(branches.results, sizes, strict=True)
    ]


def _scalar_of(dtype: Any) -> Any:
    return ir.RankedTensorType.get((), mlir.dtype_to_ir_type(np.dtype(dtype)))


_cut = primitive_of("cut", _split, _types)
mlir.register_lowering(_cut, mlir.lower_fun(_split, multiple_results=True))
mlir.register_lowering(_cut, _lowered_on_cpu, platform="cpu")


def entries(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector, as scalars."""
    return [lax.squeeze(x, (0,)) for x in cut(vector, (1,) * vector.shape[0])]


def unknown(values: PyTree) -> Any:
    """The same values, of which the compiler knows nothing.

    So it neither computes them anew for each that uses them, nor puts what it knows of
    them into other arithmetic.
    """
    return lax.optimization_barrier(values)
