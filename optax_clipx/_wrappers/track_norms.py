"""`track_norms`: norms of leaves or groups, and how large updates are, as metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._clipping.clip_by import params_like
from .._clipping.known_norm import known_norm
from .._clipping.measures import Measure, group_norms, leaf_norms
from .._clipping.metrics import TrackState, to_float32
from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._reductions.norms import Norms, norms
from .._trees.arithmetic import safe_sqrt, saturated_quotient
from .._trees.leaves import Leaves, flatten


def track_norms(
    inner: optax.GradientTransformation,
    *,
    labels: Any = None,
    ratios: bool = False,
    vanishing: float | int = 1e-4,
    exploding: float | int = 1e4,
    axis_name: Any = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures the gradient of each leaf, or each group, and changes nothing.

    .. math:: n_i = \|g_i\|, \quad r_i = \|\Delta w_i\| / \|w_i\|

    Here :math:`g_i` is the gradient of leaf :math:`i`, :math:`w_i` its parameters and
    :math:`\Delta w_i` its update. If the first clipper inside clips the norm of the
    whole gradient, it uses these norms, and the gradients are not read once more.
    :func:`metrics` then has ``"track_norms/<leaf>"``, ``"track_ratios/<leaf>"``, and
    the counts ``"track/vanishing"`` and ``"track/exploding"``. These count the leaves
    whose root mean square is zero, non-finite, or far from that of the median leaf.

    Args:
        inner: the optimizer, with its clipper in it.
        labels: measure groups of leaves instead: a pytree prefix of labels, or a
            function of path and leaf.
        ratios: measure :math:`r_i` too, which needs ``params`` and reads them and the
            updates once more.
        vanishing: a leaf counts as vanishing if its root mean square is less than this
            times that of the median leaf.
        exploding: a leaf counts as exploding if it is more than this times that.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.

    Returns:
        A transformation with the updates of ``inner``.

    Raises:
        ValueError: unless ``0 <= vanishing < exploding``; from ``init`` if two leaves
            have one name; from ``update`` without ``params`` where they are needed.
        TypeError: if ``inner`` is no transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> clipper = clipx.clip_by_global_norm(1.0)
        >>> tx = clipx.track_norms(optax.chain(clipper, optax.sgd(0.1)))
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> print(clipx.metrics(state)["track_norms/w"])
        5.0

    References:
        Glorot and Bengio, Understanding the difficulty of training deep feedforward
        neural networks, 2010, for gradients by layer.
    """
    check_transformation(inner, "inner")
    if not 0 <= vanishing < exploding:
        raise ValueError(
            f"Expected 0 <= vanishing < exploding, got vanishing={vanishing},"
            f" exploding={exploding}."
        )
    measure = leaf_norms() if labels is None else group_norms(labels)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> TrackState:
        leaves = flatten(params, updates=False)
        with mesh.mesh_of(leaves.arrays, auto=True):
            names = _names(measure, leaves)

            def zeros() -> Any:
                if not names:  # as optax.tree.map_params asks: a prefix of any dict
                    return jnp.zeros((0,), jnp.float32)
                return {name: jnp.zeros((), jnp.float32) for name in names}

            return TrackState(
                norms=zeros(),
                ratios=zeros() if ratios else None,
                vanishing=jnp.zeros((), jnp.int32),
                exploding=jnp.zeros((), jnp.int32),
                inner=inner.init(params),
            )

    def update_fn(
        updates: Any, state: TrackState, params: Any = None, **extra: Any
    ) -> tuple[Any, TrackState]:
        check_state(state, TrackState)
        leaves = flatten(updates)
        if not leaves.arrays:
            updates, after = wrapped.update(updates, state.inner, params, **extra)
            return updates, state._replace(inner=after)
        groups = measure.groups(leaves, axis_name, specs)
        with mesh.mesh_of(leaves.arrays):
            places = mesh.placements(leaves.arrays, leaves.paths, axis_name, specs)
            sizes = groups.sizes(leaves.arrays, places)
            (found,) = norms(
                [leaves.arrays], groups, 2.0, leaves.paths, axis_name, specs
            )
            few, many = _far(found.value, sizes, vanishing, exploding)
            whole = _together(found)
        with known_norm(leaves.arrays, whole):
            updates, after = wrapped.update(updates, state.inner, params, **extra)
        names = _names(measure, leaves)
        with mesh.mesh_of(leaves.arrays):
            share = None
            if ratios:
                moved = flatten(updates)
                before = params_like(moved, params)
                step, size = norms(
                    [moved.arrays, before], groups, 2.0, moved.paths, axis_name, specs
                )
                share = _by_name(names, _quotients(step.value, size.value))
            new_state = TrackState(
                _by_name(names, found.value), share, few, many, after
            )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _names(measure: Measure, leaves: Leaves) -> list[str]:
    if measure.scope == "group":
        names = [str(name) for name in measure.names(leaves)]
    else:
        names = ["/".join(path) for path in leaves.paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Expected a name for each leaf or group, got {twice} twice.")
    return names


def _by_name(names: list[str], packed: jax.Array) -> dict[str, jax.Array]:
    return {name: to_float32(packed[i]) for i, name in enumerate(names)}


def _far(
    norms: jax.Array,
    sizes: Any,
    vanishing: float | int,
    exploding: float | int,
) -> tuple[jax.Array, jax.Array]:
    """How many leaves are far below and above the middle one, entry by entry."""
    known = isinstance(sizes, np.ndarray)
    rms = norms / jnp.asarray((np if known else jnp).sqrt(sizes), norms.dtype)
    usable = jnp.isfinite(rms) & (rms > 0)
    # Half of the usable ones are below: where the rest comes last, a plain sort tells.
    order = jnp.sort(jnp.where(usable, rms, jnp.inf))
    middle = order[jnp.maximum(jnp.sum(usable) - 1, 0) // 2]
    low = jnp.isfinite(rms) & ((rms == 0) | (rms < middle * vanishing))
    high = ~jnp.isfinite(rms) | (rms / exploding > middle)
    return jnp.sum(low).astype(jnp.int32), jnp.sum(high).astype(jnp.int32)


def _together(found: Norms) -> Norms:
    """The norm of the whole tree from the groups' sums of squares."""
    # In the largest unit: what is lost beside it is below its rounding.
    unit = jnp.max(found.unit)
    change = found.unit / unit
    squares = jnp.sum(jnp.square(found.root * change))
    root = safe_sqrt(squares)
    return Norms(saturated_quotient(root, 1 / unit), root, unit)


def _quotients(step: jax.Array, size: jax.Array) -> jax.Array:
    safe = jnp.where(size > 0, size, 1)
    return jnp.where(size > 0, step / safe, jnp.where(step > 0, jnp.inf, 0))
