"""One of several ways to compute the same, taken once the platform is known."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.interpreters import mlir
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .._trees.arithmetic import is_concrete
from .._trees.types import Arrays
from .mesh import varying
from .primitives import primitive_of


class Ways(NamedTuple):
    """Functions that compute the same of the same, each fast on its platforms."""

    cpu: Callable[..., Any]
    tpu: Callable[..., Any]
    others: Callable[..., Any]


def by_platform(ways: Ways, given: PyTree, like: PyTree = None) -> Any:
    """What the function for the platform makes of what is given.

    `jax.lax.platform_dependent` traces every function. Where it is said what the
    results are like, and all lies on one device, only the function of the platform for
    which a program is lowered is traced, and so is what it calls.

    `python benchmarks/everyday.py`: the column of traces.
    """
    platform = _platform.get()
    if platform is not None:
        return _way(ways, platform)(given)
    arrays, structure = jax.tree.flatten(given)
    if like is None or is_on_mesh(arrays) or is_concrete(given):
        return _all_traced(ways, given)
    shapes, outcome = jax.tree.flatten(like)
    kinds = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in shapes)
    call = _Call(ways, structure, kinds)
    return jax.tree.unflatten(outcome, _chosen.bind(*arrays, call=call))


def is_on_mesh(arrays: Sequence[ArrayLike]) -> bool:
    """Whether there is a mesh in whose context, or on whose axes, arrays are."""
    # In JAX 0.7 types name the mesh of arrays that were put on Auto axes, too.
    return not jax.sharding.get_abstract_mesh().empty or any(
        varying(x) or not jax.typeof(x).sharding.mesh.empty for x in arrays
    )


_platform: ContextVar[str | None] = ContextVar("optax_clipx_platform", default=None)


def _way(ways: Ways, platform: str) -> Callable[..., Any]:
    return {"cpu": ways.cpu, "tpu": ways.tpu}.get(platform, ways.others)


def _all_traced(ways: Ways, given: PyTree) -> Any:
    if ways.tpu is ways.others:
        return lax.platform_dependent(given, cpu=ways.cpu, default=ways.others)
    return lax.platform_dependent(
        given, cpu=ways.cpu, tpu=ways.tpu, default=ways.others
    )


class _Call(NamedTuple):
    """What is static: the functions, the structure of the argument, the results."""

    ways: Ways
    structure: Any
    kinds: tuple[Any, ...]

    def given(self, arrays: Arrays) -> Any:
        """The argument."""
        return jax.tree.unflatten(self.structure, arrays)


def _run(*arrays: jax.Array, call: _Call) -> list[Any]:
    return jax.tree.leaves(_all_traced(call.ways, call.given(arrays)))


# Where a program is differentiated or mapped, all functions are traced after all.
_chosen = primitive_of("by_platform", _run, lambda *arrays, call: list(call.kinds))


def _lowered(platform: str) -> Callable[..., Any]:
    def lower(context: mlir.LoweringRuleContext, *arrays: Any, call: _Call) -> Any:
        def run(*arrays: jax.Array) -> list[Any]:
            token = _platform.set(platform)
            try:
                return jax.tree.leaves(_way(call.ways, platform)(call.given(arrays)))
            finally:
                _platform.reset(token)

        return mlir.lower_fun(run, multiple_results=True)(context, *arrays)

    return lower


mlir.register_lowering(_chosen, _lowered("gpu"))
for _name in ("cpu", "tpu"):
    mlir.register_lowering(_chosen, _lowered(_name), platform=_name)


def stored_on_cpu(x: PyTree) -> Any:
    """The same array, which XLA for CPU writes to memory before it is read."""
    ways = Ways(lax.optimization_barrier, _unchanged, _unchanged)
    return by_platform(ways, x, like=x)


def _unchanged(x: PyTree) -> Any:
    return x
