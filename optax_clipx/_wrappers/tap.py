"""`tap`: the metrics of an optimizer handed to a function on the host."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import PyTree

from .._clipping.metrics import count, metrics, to_float32
from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._devices.host import report
from .._trees.arguments import check_static_count
from .._trees.types import AnyArray, Index
from .reports import Reports
from .sinks import as_function, name_of
from .skip_spikes import init_inner

SWITCH = "OPTAX_CLIPX_TAP"


class TapState(NamedTuple):
    """How many updates there have been, and the optimizer inside."""

    tapped: jax.Array
    inner: Any


def tap(
    inner: optax.GradientTransformation, sink: object, *, every: Index = 1
) -> optax.GradientTransformationExtraArgs:
    """Passes the metrics of an optimizer to a function in each step.

    Use it in training loops that do not return the optimizer state. The function is
    called on the host as ``sink(step, {"clip/norm": 1.2, ...})``. The dict is the
    result of :func:`metrics`. ``step`` counts the calls of ``update`` from 0. Put
    ``tap`` around the whole optimizer.

    - **One report per step**, on any number of devices and processes, and in the order
      of the steps. The first device of the mesh reports. With several processes this
      device usually belongs to process 0.
    - **Training never waits for the sink.** A thread calls the sink. Up to 4,096
      reports wait in a queue. Further reports are dropped, with a warning and a count.
    - **A sink that raises an error** does not stop training. The first error is shown
      as a warning, and all errors are counted. :func:`flush_taps` returns both counts.
    - **Under vmap** one report has arrays with an entry for each seed.
    - **If training is restarted from an earlier step**, the repeated steps are reported
      again.

    The environment variable ``OPTAX_CLIPX_TAP=off`` turns all taps off. It is read
    when ``update`` is traced. The state is the same with and without it.

    Args:
        inner: the optimizer, with a clipper, :func:`skip_spikes` or
            :func:`track_norms` in it.
        sink: a function of step and metrics, or a :class:`History`, or ``print``, or a
            ``SummaryWriter`` of TensorBoard. ``print`` prints one line per report. The
            metrics are Python numbers, or NumPy arrays under vmap.
        every: the steps that are multiples of this number are reported. In all other
            steps nothing is sent to the host.

    Returns:
        A transformation with the updates of ``inner``.

    Raises:
        TypeError: if ``inner`` is not a transformation, or if ``sink`` is none of the
            sinks above.
        ValueError: unless ``every >= 1``, or if the environment variable is neither
            ``on`` nor ``off``. ``init`` raises it if nothing in ``inner`` keeps
            metrics.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> history = clipx.History()
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> tx = clipx.tap(optax.chain(clipper, optax.sgd(0.1)), history)
        >>> params = jnp.zeros(2)
        >>> def step(state, x):
        ...     _, state = tx.update(jnp.array([3.0, x]), state, params)
        ...     return state, None
        >>> state, _ = jax.lax.scan(step, tx.init(params), jnp.arange(0.0, 8.0, 4.0))
        >>> counts = clipx.flush_taps()
        >>> history["clip/norm"].tolist()
        [3.0, 5.0]

    References:
        :func:`jax.debug.callback` also calls a function on the host.
    """
    check_transformation(inner, "inner")
    check_static_count(every, "every")
    reports = Reports(as_function(sink), name_of(sink), int(every))
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> TapState:
        with mesh.mesh_of(jax.tree.leaves(params), auto=True):
            state = TapState(jnp.zeros((), jnp.int32), init_inner(inner, params))
        metrics(state)  # an error here if there is nothing to report
        return state

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, TapState]:
        check_state(state, TapState)
        leaves = jax.tree.leaves(updates)
        updates, after = wrapped.update(updates, state.inner, params, **extra)
        with mesh.mesh_of(leaves):
            tapped = count(state.tapped, True)
            if _is_on():
                seen, carried = metrics(after), (updates, tapped)
                updates, tapped = _report(reports, state.tapped, seen, carried)
        return updates, TapState(tapped, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_on() -> bool:
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"Expected {SWITCH} to be 'on' or 'off', got {value!r}.")
    return value == "on"


def _report(
    reports: Reports, step: jax.Array, values: dict[str, jax.Array], carried: PyTree
) -> Any:
    """Sends what was measured in a step to the host, and gives back what is carried."""
    kinds = {name: _kind(x) for name, x in values.items()}
    packed = _pack([step, *values.values()], ["i", *kinds.values()])

    def on_host(packed: AnyArray) -> None:
        # A copy: a thread that lets go of JAX's memory when Python ends is an abort.
        bits = np.array(packed)
        reports.put(int(bits[..., 0].max()), functools.partial(_unpack, kinds, bits))

    leaves, treedef = jax.tree.flatten(carried)
    return jax.tree.unflatten(
        treedef, report(on_host, reports.every, step, packed, leaves)
    )


def _kind(value: jax.Array) -> str:
    kind = jnp.result_type(value).kind
    return kind if kind in "bi" else "f"


def _pack(values: list[jax.Array], kinds: list[str]) -> jax.Array:
    """One array of int32 with the bits of all: it is sent in one piece."""

    def bits(value: jax.Array, kind: str) -> jax.Array:
        if kind != "f":
            return value.astype(jnp.int32)
        value = lax.stop_gradient(to_float32(jnp.asarray(value)))
        return lax.bitcast_convert_type(value, jnp.int32)

    return jnp.stack([bits(x, kind) for x, kind in zip(values, kinds, strict=True)], -1)


def _unpack(kinds: dict[str, str], bits: np.ndarray) -> dict[str, Any]:
    """The metrics by name: Python numbers, or arrays if there are several seeds."""
    dtypes = {"f": np.float32, "i": np.int32, "b": np.int32}
    read = {
        name: np.ascontiguousarray(bits[..., i]).view(dtypes[kind])
        for i, (name, kind) in enumerate(kinds.items(), 1)
    }
    read = {
        name: x.astype(bool) if kinds[name] == "b" else x for name, x in read.items()
    }
    return read if bits.ndim > 1 else {name: x.item() for name, x in read.items()}
