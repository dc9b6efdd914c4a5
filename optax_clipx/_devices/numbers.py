"""A few numbers from a few numbers, which XLA for CPU compiles as one kernel."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.api_util import debug_info
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun
from jax.extend.linear_util import wrap_init
from jax.interpreters import mlir
from jax.interpreters.partial_eval import trace_to_jaxpr_dynamic
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as hlo
from jaxtyping import PyTree

from .._trees.arithmetic import is_concrete
from .._trees.sizes import is_known
from .mesh import can_be_joined, lies_whole
from .primitives import primitive_of


def as_one(fun: Callable[..., PyTree], *given: PyTree) -> Any:
    """`fun(*given)`: a few numbers from a few numbers, compiled as one kernel.

    XLA for CPU compiles a kernel for each number that comes out, and computes anew in
    the loop of every leaf what led to its scale. A small loop it compiles as a whole.
    So the numbers are computed in a loop that runs once, which XLA cannot know. What is
    not made of few numbers by plain operations is called as it is.

    `python benchmarks/everyday.py`: with it a step of Adam on 4 leaves compiles 1.3
    to 1.5 times as long with zclip as with optax's global norm, without it 2.6 times.
    """
    leaves, structure = jax.tree.flatten(given)
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    if is_inside() or is_concrete(given):
        return fun(*given)

    def of_arrays(*traced: jax.Array) -> Any:
        """Numbers that are known remain known."""
        each = iter(traced)
        filled = [next(each) if isinstance(x, jax.Array) else x for x in leaves]
        found, form = jax.tree.flatten(fun(*jax.tree.unflatten(structure, filled)))
        forms.append(form)
        return found

    forms: list[Any] = []
    inside = _in_one.set(True)
    try:
        program, known = _traced(of_arrays, arrays)
    finally:
        _in_one.reset(inside)
    steps = program.replace(constvars=[], invars=[*program.constvars, *program.invars])
    values = [*known, *arrays]
    if not _is_plain(steps) or not _are_few(steps, values):
        return fun(*given)
    found = _computed.bind(*values, program=ClosedJaxpr(steps, ()))
    return jax.tree.unflatten(forms[-1], map(_as_array, found))


# Numbers that go into a loop and come out, and the operations in it. Of more, or with
# others, XLA compiles a kernel for each operation.
FEW = 128
_NAMES = """
abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy div eq exp
exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt
max min mul ne neg not or pad pow reduce_and reduce_max reduce_min reduce_or reduce_sum
rem reshape round rsqrt select_n sign slice split sqrt square squeeze stack sub tanh
transpose xor
"""
_PLAIN = frozenset(_NAMES.split())

_in_one: ContextVar[bool] = ContextVar("optax_clipx_in_one", default=False)


def _are_few(program: Any, given: list[Any]) -> bool:
    """Whether few numbers go in and out, and lie whole, as far as types say."""
    needed = _looked_at(program)
    sizes = [x.aval.size for x in (*needed, *_computed_by(program))]
    values = dict(zip(program.invars, given, strict=True))
    arrays = [values[x] for x in needed]
    whole = not arrays or (can_be_joined(arrays) and all(map(lies_whole, arrays)))
    return whole and is_known(*sizes) and sum(sizes) <= FEW


def _traced(fun: Callable[..., Any], arrays: list[jax.Array]) -> tuple[Any, list[Any]]:
    """What `jax.make_jaxpr` makes, with a thousand fewer calls of Python functions."""
    wrapped = wrap_init(fun, debug_info=debug_info("as_one", fun, tuple(arrays), {}))
    types = list(map(jax.typeof, arrays))
    program, _, constants = trace_to_jaxpr_dynamic(wrapped, types)
    return program, constants


def is_inside() -> bool:
    """Whether such numbers are being computed."""
    return _in_one.get()


def _looked_at(program: Any) -> list[Any]:
    """What a program reads of its arguments."""
    read = {id(x) for step in program.eqns for x in step.invars}
    return [x for x in program.invars if id(x) in read]


def _computed_by(program: Any) -> list[Any]:
    """What comes out of a program that neither went in nor is known."""
    given = set(program.invars)
    outcome = dict.fromkeys(x for x in program.outvars if isinstance(x, Var))
    return [x for x in outcome if x not in given]


def _is_plain(program: Any) -> bool:
    """Whether all is made of few numbers, by plain operations."""
    for step in program.eqns:
        if step.primitive.name in ("jit", "pjit", "custom_jvp_call"):
            plain = _is_plain(step.params.get("jaxpr", step.params.get("call_jaxpr")))
        else:
            plain = step.primitive.name in _PLAIN
        sizes = [x.aval.size for x in (*step.invars, *step.outvars)]
        few = is_known(*sizes) and max(sizes, default=0) <= FEW
        if step.effects or not plain or not few:
            return False
    return True


def _run(*arrays: jax.Array, program: ClosedJaxpr) -> list[Any]:
    return list(map(_as_array, jaxpr_as_fun(program)(*arrays)))


def _as_array(x: ArrayLike) -> jax.Array:
    """A literal of a program comes out of JAX as what is no `jax.Array`."""
    return x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x))


def _types(*arrays: object, program: ClosedJaxpr) -> list[Any]:
    return program.out_avals


# What a program makes of its arguments.
_computed = primitive_of("as_one", _run, _types)
# The program itself: its steps are lowered without being traced once more.
_program = primitive_of("program", _run, _types)


def _lowered(
    context: mlir.LoweringRuleContext, *arrays: Any, program: ClosedJaxpr
) -> Any:
    return mlir.core_call_lowering(context, *arrays, name="as_one", call_jaxpr=program)


def _lowered_on_cpu(
    context: mlir.LoweringRuleContext, *arrays: Any, program: ClosedJaxpr
) -> Any:
    """What comes out as it went in, or is known, stays out of the loop."""
    steps = program.jaxpr
    needed, made = _looked_at(steps), _computed_by(steps)
    has_float = any(x.aval.dtype.kind == "f" for x in needed)  # which the loop watches
    if not made or not has_float or not _is_for_one_device(context):
        return _lowered(context, *arrays, program=program)
    inner = ClosedJaxpr(steps.replace(invars=needed, outvars=made), ())
    context = context.replace(avals_in=inner.in_avals, avals_out=inner.out_avals)
    values = dict(zip(steps.invars, arrays, strict=True))
    read = [values[x] for x in needed]
    values.update(zip(made, _loop(context, *read, program=inner), strict=True))
    return [
        mlir.ir_constant(x.val) if isinstance(x, Literal) else values[x]
        for x in steps.outvars
    ]


def _loop(context: mlir.LoweringRuleContext, *arrays: Any, program: ClosedJaxpr) -> Any:
    """A loop that runs once, written as XLA's own operations: quicker than tracing it.

    What comes out takes the places of what went in: XLA would move out of the loop
    what is computed of numbers that stay.
    """
    given, made = program.in_avals, program.out_avals
    free: dict[Any, list[int]] = {}
    for i, x in enumerate(given):
        free.setdefault((x.shape, x.dtype), []).append(i)
    slots, places = list(arrays), []
    for x in made:
        alike = free.get((x.shape, x.dtype))
        if not alike:
            slots.append(mlir.ir_constant(np.zeros(x.shape, x.dtype)))
        places.append(alike.pop() if alike else len(slots) - 1)
    watched = next(i for i, x in enumerate(given) if x.dtype.kind == "f")
    zero, one, two = (mlir.ir_constant(np.int32(i)) for i in range(3))
    carry = [zero, *slots]
    types = [x.type for x in carry]
    loop = hlo.WhileOp(types, carry)

    block = loop.regions[0].blocks.append(*types)
    with ir.InsertionPoint(block):
        hlo.return_([_compared(block.arguments[0], "LT", one)])

    block = loop.regions[1].blocks.append(*types)
    with ir.InsertionPoint(block):
        before = list(block.arguments)[1 : 1 + len(given)]
        after = [mlir.ir_constant(np.zeros(x.shape, x.dtype)) for x in given]
        after += list(block.arguments)[1 + len(given) :]
        found = _lowered(context, *before, program=program)
        for place, x in zip(places, found, strict=True):
            after[place] = x
        number = _first(before[watched], given[watched].shape)
        same = _compared(number, "EQ", number)
        hlo.return_([hlo.select(same, one, two), *after])
    return [loop.results[1 + place] for place in places]


def _is_for_one_device(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will not cut what goes in: types do not show `in_shardings`."""
    return getattr(context.module_context.axis_context, "num_devices", 0) == 1


def _compared(left: Any, how: str, right: Any) -> Any:
    return hlo.compare(left, right, hlo.ComparisonDirectionAttr.get(how))


def _first(numbers: Any, shape: tuple[int, ...]) -> Any:
    """The first of some numbers, as a scalar."""
    if not shape:
        return numbers
    start, end = (mlir.dense_int_array([i] * len(shape)) for i in range(2))
    scalar = ir.RankedTensorType.get((), numbers.type.element_type)
    return hlo.reshape(scalar, hlo.slice(numbers, start, end, end))


def _lowered_on_gpu(
    context: mlir.LoweringRuleContext, *arrays: Any, program: ClosedJaxpr
) -> Any:
    run = functools.partial(_from_one_vector, program)
    return mlir.lower_fun(run, multiple_results=True)(context, *arrays)


mlir.register_lowering(_program, _lowered)
mlir.register_lowering(_computed, _lowered)
mlir.register_lowering(_computed, _lowered_on_cpu, platform="cpu")
for _gpu in ("cuda", "rocm"):
    mlir.register_lowering(_computed, _lowered_on_gpu, platform=_gpu)


def _from_one_vector(program: ClosedJaxpr, *arrays: jax.Array) -> Any:
    """The same, from numbers that lie in one vector, as do known ones that come out.

    XLA for GPU puts what reads the same array into one kernel, unless it is a scalar.

    `python benchmarks/everyday.py --h100`: a step of Adam on 4 leaves has 7 kernels,
    and 10 with zclip. Without it they were 11 and 16.
    """
    outcome = program.jaxpr.outvars
    known = [i for i, x in enumerate(outcome) if isinstance(x, Literal)]
    given = [*arrays, *(jnp.asarray(outcome[i].val) for i in known)]
    places = [i for i, x in enumerate(given) if x.dtype == np.float32]
    # Of a longer vector the copy is a kernel more (AGC on 4 leaves: 17 for 16), and of
    # two numbers as well (the global norm: 8 for 7).
    few = is_known(*[x.size for x in arrays]) and all(x.size <= 64 for x in arrays)
    if len(given) <= 2 or not places or not few:
        return _program.bind(*arrays, program=program)
    if len(places) > 1:  # what is put together takes integers along
        places += [i for i, x in enumerate(given) if x.dtype == np.int32]
    parts = [lax.reshape(_as_integers(given[i]), (given[i].size,)) for i in places]
    vector = lax.optimization_barrier(lax.concatenate(parts, 0))
    start = 0
    for i, part in zip(places, parts, strict=True):
        piece = lax.slice(vector, (start,), (start + part.size,))
        piece = lax.reshape(piece, given[i].shape)
        given[i] = lax.bitcast_convert_type(piece, given[i].dtype)
        start += part.size
    found = _program.bind(*given[: len(arrays)], program=program)
    for place, x in zip(known, given[len(arrays) :], strict=True):
        found[place] = x
    made = _computed_by(program.jaxpr)
    each = zip(found, outcome, strict=True)
    return [x if name in made else _copied(x) for x, name in each]


def _copied(x: jax.Array) -> jax.Array:
    """The same number. XLA would fuse a mere slice with nothing."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.select(lax.ne(x, x), jnp.full_like(x, jnp.nan), x)


def _as_integers(x: jax.Array) -> jax.Array:
    """The same bits."""
    return lax.bitcast_convert_type(x, np.int32)
