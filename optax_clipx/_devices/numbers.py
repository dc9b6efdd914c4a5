"""A few numbers from a few numbers, which XLA for CPU compiles as one kernel."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import mlir

from .._trees.arithmetic import full_like, is_concrete
from .._trees.sizes import is_known
from .mesh import can_be_joined, lies_whole
from .primitives import primitive_of


def as_one(fun: Callable[..., Any], *given: Any) -> Any:
    """`fun(*given)`: a few numbers from a few numbers, compiled as one kernel.

    XLA for CPU compiles a kernel for each number that comes out, and computes anew in
    the loop of every leaf what led to its scale. A small loop it compiles as a whole.
    So the numbers are computed in a loop that runs once, which XLA cannot know.

    `python -m pytest tests/devices/test_as_one.py`: with it a step of Adam on 4 leaves
    has 14 kernels, without it 24, and with optax's clipping 14.
    """
    arrays = jax.tree.leaves(given)
    whole = can_be_joined(arrays) and all(map(lies_whole, arrays))
    if is_inside() or is_concrete(given) or not whole:
        return fun(*given)
    inside = _in_one.set(True)
    try:
        program, shapes = jax.make_jaxpr(fun, return_shape=True)(*given)
    finally:
        _in_one.reset(inside)
    names = [*program.jaxpr.constvars, *program.jaxpr.invars]
    known = dict(zip(names, (*program.consts, *arrays), strict=True))
    # What comes out as it went in, or is not looked at, stays out of the loop.
    outcome = program.jaxpr.outvars
    made = list(dict.fromkeys(x for x in outcome if not _is_known(x, known)))
    read = {id(x) for step in program.jaxpr.eqns for x in step.invars}
    needed = [x for x in names if id(x) in read]
    if not _is_small(program.jaxpr, needed, made):
        return fun(*given)
    steps = program.jaxpr.replace(constvars=[], invars=needed, outvars=made)
    arrays = [jnp.asarray(known[x]) for x in needed]
    found = _computed.bind(*arrays, program=ClosedJaxpr(steps, ()))
    known.update(zip(made, found, strict=True))
    results = [_value(x, known) for x in outcome]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


_in_one: ContextVar[bool] = ContextVar("optax_clipx_in_one", default=False)


def is_inside() -> bool:
    """Whether such numbers are being computed."""
    return _in_one.get()


def _is_small(program: Any, needed: list[Any], made: list[Any]) -> bool:
    """Whether XLA would compile a loop around a program as a whole."""
    sizes = [x.aval.size for x in needed + made]
    has_float = any(x.aval.dtype.kind == "f" for x in needed)  # which the loop watches
    few = is_known(*sizes) and sum(sizes) <= 128
    return has_float and few and _has_small_steps(program)


def _has_small_steps(program: Any) -> bool:
    for step in program.eqns:
        name = step.primitive.name
        inner = step.params.get("jaxpr", step.params.get("call_jaxpr"))
        if name in ("jit", "pjit", "custom_jvp_call"):
            small = _has_small_steps(inner)
        else:
            plain = inner is None and name not in ("cond", "while", "sort")
            small = plain and all(x.aval.size <= 64 for x in step.outvars)
        if step.effects or not small:
            return False
    return True


def _is_known(name: Any, known: dict[Any, Any]) -> bool:
    return isinstance(name, Literal) or name in known


def _value(name: Any, known: dict[Any, Any]) -> Any:
    return jnp.asarray(name.val) if isinstance(name, Literal) else known[name]


def _run(*arrays: Any, program: Any) -> list[Any]:
    return jaxpr_as_fun(program)(*arrays)


def _types(*arrays: Any, program: Any) -> list[Any]:
    return program.out_avals


# What a program makes of its arguments. On CPU its lowering is the loop.
_computed = primitive_of("as_one", _run, _types)
# The program itself: its steps are lowered without being traced once more.
_program = primitive_of("program", _run, _types)


def _lowered(context: Any, *arrays: Any, program: Any) -> Any:
    return mlir.core_call_lowering(context, *arrays, name="as_one", call_jaxpr=program)


def _lowered_on_cpu(context: Any, *arrays: Any, program: Any) -> Any:
    def run(*arrays: Any) -> list[Any]:
        return _in_a_loop(_plain(program), program.out_avals, *arrays)

    return mlir.lower_fun(run, multiple_results=True)(context, *arrays)


def _lowered_on_gpu(context: Any, *arrays: Any, program: Any) -> Any:
    run = functools.partial(_from_one_vector, _plain(program))
    return mlir.lower_fun(run, multiple_results=True)(context, *arrays)


mlir.register_lowering(_program, _lowered)


def _plain(program: Any) -> Callable[..., list[Any]]:
    return functools.partial(_program.bind, program=program)


mlir.register_lowering(_computed, _lowered)
mlir.register_lowering(_computed, _lowered_on_cpu, platform="cpu")
for _gpu in ("cuda", "rocm"):
    mlir.register_lowering(_computed, _lowered_on_gpu, platform=_gpu)


def _from_one_vector(fun: Callable[..., Any], *arrays: Any) -> Any:
    """The same, from numbers that lie in one vector.

    XLA for GPU puts what reads the same array into one kernel, unless it is a scalar.

    `python benchmarks/everyday.py --h100`: with it a step of Adam on 4 leaves has 10
    kernels, without it 14, and with optax's clipping 9.
    """
    floats = [i for i, x in enumerate(arrays) if x.dtype == np.float32]
    if not floats:
        return fun(*arrays)
    parts = [lax.reshape(arrays[i], (arrays[i].size,)) for i in floats]
    vector = lax.optimization_barrier(lax.concatenate(parts, 0))
    given, start = list(arrays), 0
    for i, part in zip(floats, parts, strict=True):
        piece = lax.slice(vector, (start,), (start + part.size,))
        given[i] = lax.reshape(piece, arrays[i].shape)
        start += part.size
    return fun(*given)


def _in_a_loop(
    fun: Callable[..., list[Any]], shapes: list[Any], *arrays: Any
) -> list[Any]:
    """The same, in a loop that runs once.

    What comes out takes the places of what went in: XLA would move out of the loop
    what is computed of numbers that stay.
    """
    slots, places = list(arrays), []
    free: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        free.setdefault((x.shape, x.dtype), []).append(i)
    for x in shapes:
        alike = free.get((x.shape, x.dtype))
        if not alike:
            slots.append(lax.full(x.shape, 0, x.dtype))
        places.append(alike.pop() if alike else len(slots) - 1)
    watched = next(i for i, x in enumerate(arrays) if x.dtype.kind == "f")
    emptied = [i for i in range(len(arrays)) if i not in places]

    def body(carry: Any) -> Any:
        _, slots = carry
        after = list(slots)
        for i in emptied:
            after[i] = full_like(slots[i], 0)
        for place, x in zip(places, fun(*slots[: len(arrays)]), strict=True):
            after[place] = x
        number = lax.squeeze(
            lax.slice(lax.reshape(slots[watched], (slots[watched].size,)), (0,), (1,)),
            (0,),
        )
        return lax.select(lax.eq(number, number), np.int32(1), np.int32(2)), after

    start = (np.int32(0), slots)
    _, after = lax.while_loop(lambda carry: lax.lt(carry[0], np.int32(1)), body, start)
    return [after[place] for place in places]
