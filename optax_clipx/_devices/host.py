"""Reports to the host from a program on any number of devices: one, not one a device.

`report` is the identity on some arrays that hands another to a function of the host. It
is a primitive of its own because JAX calls every program with an effect, as that of
`jax.debug.callback`, through Python: 0.5 ms a step with 25 arrays, and more with more.
Without an effect, a report is made if one of its results is used.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._trees.types import Arrays
from .mesh import index_in, manual_axes

OnHost = Callable[[Any], None]


def report(
    on_host: OnHost,
    every: int,
    step: jax.Array,
    values: jax.Array,
    carried: Arrays,
) -> list[jax.Array]:
    """Calls `on_host(values)` if the step is a multiple of `every`.

    Under vmap one call has the values of all, with one axis more in front.

    Returns:
        What is carried, unchanged; the call is made if any of it is used.
    """
    first = index_in(manual_axes()) == 0
    step, values = lax.stop_gradient((step, values))
    return _report.bind(step, values, first, *carried, on_host=on_host, every=every)


def _at_once(
    step: jax.Array,
    values: jax.Array,
    first: jax.Array,
    *carried: jax.Array,
    on_host: OnHost,
    every: int,
) -> list[Any]:
    if int(step) % every == 0 and _is_first_process(values):
        on_host(values)
    return list(carried)


def _types(
    step: object, values: object, first: object, *carried: object, **params: object
) -> list[Any]:
    return list(carried)


def _in_program(
    step: jax.Array,
    values: jax.Array,
    first: jax.Array,
    *carried: jax.Array,
    on_host: OnHost,
    every: int,
) -> list[Any]:
    def call(values: jax.Array) -> None:
        _call_host(on_host, values)

    if every == 1 and not manual_axes():
        call(values)
    else:
        lax.cond(first & (step % every == 0), call, lambda _: None, values)
    return list(carried)


def _of_all(
    args: Arrays, dims: Sequence[int | None], **params: object
) -> tuple[Any, Any]:
    """One report for all that vmap maps over, and a condition that stays one."""
    (step, values, first, *carried), (at, values_at, first_at, *carried_at) = args, dims
    # What has stopped, as in a mapped while loop, keeps its last step.
    step = step if at is None else jnp.max(step, at)
    first = first if first_at is None else jnp.any(first, first_at)
    values = values if values_at is None else jnp.moveaxis(values, values_at, 0)
    return _report.bind(step, values, first, *carried, **params), carried_at


def _derivative(primals: PyTree, tangents: PyTree, **params: object) -> tuple[Any, Any]:
    """That of the identity, which reports nothing."""
    return _report.bind(*primals, **params), list(tangents[3:])


def wait_for_programs() -> None:
    """Waits until the programs that were started have run, with their reports."""
    jax.effects_barrier()
    # Programs without effects are known by their results, or, where these were dropped,
    # by their place before a further program of the same devices.
    devices = jax.local_devices()
    mesh = Mesh(devices, "all", axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("all"))
    with jax.set_mesh(mesh):  # the caller's may be another
        mark = _sum(jax.device_put(np.zeros(len(devices), np.float32), spread))
    for array in [mark, *jax.live_arrays()]:
        with contextlib.suppress(RuntimeError):  # of a program that failed, or donated
            array.block_until_ready()


@jax.jit
def _sum(numbers: jax.Array) -> jax.Array:
    return jnp.sum(numbers)


_report = Primitive("report")
_report.multiple_results = True
_report.def_impl(_at_once)
_report.def_abstract_eval(_types)
_lowered = mlir.lower_fun(_in_program, multiple_results=True)
mlir.register_lowering(_report, _lowered, cacheable=False)
batching.primitive_batchers[_report] = _of_all
ad.primitive_jvps[_report] = _derivative


def _is_first_process(array: jax.Array) -> bool:
    """Whether the first device that holds an array belongs to this process."""
    devices: Any = array.sharding.device_set
    first = min(devices, key=lambda device: device.id)
    return first.process_index == jax.process_index()


def _call_host(on_host: OnHost, values: jax.Array) -> None:
    """Calls the host from the first device along all axes that are not manual."""
    if not manual_axes():
        _call.bind(values, on_host=on_host)
        return

    def call(values: jax.Array) -> None:
        jax.debug.callback(on_host, values)

    left = _axes_left()
    if len(left) < 2:
        return call(values)

    def call_on_first(values: jax.Array) -> tuple[()]:
        lax.cond(index_in(left) == 0, call, lambda _: None, values)
        return ()

    return _over(left, call_on_first, values)


def _as_debug_callback(
    values: object, *, on_host: OnHost
) -> tuple[list[object], set[Any]]:
    """Results and effects: none, and those of `jax.debug.callback`."""
    return [], _effects_of_callbacks()


@functools.cache
def _effects_of_callbacks() -> set[Any]:
    return set(jax.make_jaxpr(lambda: jax.debug.callback(print))().effects)


def _lower_call(context: Any, values: Any, *, on_host: OnHost) -> list[Any]:
    """On one device the host is handed a NumPy array, on several by JAX's own callback.

    `jax.debug.callback` puts what it hands over on a device first, inside of the
    program. Reports of every tenth step of a perceptron cost 5.5% of a step with it,
    and 3% without (benchmarks/tap.py).
    """

    def by_jax(values: jax.Array) -> list[object]:
        jax.debug.callback(on_host, values)
        return []

    def directly(values: np.ndarray) -> tuple[()]:
        on_host(values)
        return ()

    axes = context.module_context.axis_context
    if getattr(axes, "num_devices", None) != 1:
        return list(mlir.lower_fun(by_jax, multiple_results=True)(context, values))
    results, *_ = mlir.emit_python_callback(
        context,
        directly,
        None,
        [values],
        context.avals_in,
        context.avals_out,
        has_side_effect=True,
    )
    return list(results)


_call = Primitive("call_host")
_call.multiple_results = True
_call.def_effectful_abstract_eval(_as_debug_callback)
mlir.register_lowering(_call, _lower_call, cacheable=False)


def call_from_each_device(fun: Callable[..., None], *values: jax.Array) -> None:
    """Calls the host from each device, with what it holds of the values."""

    def call(*values: jax.Array) -> tuple[()]:
        jax.debug.callback(fun, *values, partitioned=True)
        return ()

    left = _axes_left()
    if len(left) < 2:
        call(*values)
    else:
        _over(left, call, *values)


def _axes_left() -> tuple[str, ...]:
    """In code that is manual over some axes, the others."""
    manual = manual_axes()
    axes = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in axes if name not in manual) if manual else ()


def _over(
    axes: tuple[str, ...], fun: Callable[..., PyTree], *values: jax.Array
) -> None:
    """Makes the other axes manual, too: JAX 0.10 does it itself, but for one alone."""
    if jax.__version_info__ < (0, 10):  # XLA may abort the process
        raise ValueError(
            f"Cannot call the host in a shard_map that leaves the mesh axes {axes} to"
            f" the compiler on JAX {jax.__version__}. Let it map over all axes, or"
            " install jax>=0.10; OPTAX_CLIPX_TAP=off turns taps off."
        )
    specs = tuple(PartitionSpec() for _ in values)
    jax.shard_map(fun, in_specs=specs, out_specs=(), axis_names=set(axes))(*values)
