"""Clipping inside of the backward pass.

Identity functions: what they get they return, and on the way back the cotangent, the
gradient by their value, is clipped. Put one where gradients explode, as at the hidden
state of a recurrent network, and each step of the backward pass is limited.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._reductions.plan import Ord
from .._thresholds.constant import constant
from .._trees.arguments import AxisNames, Limit, Specs, as_float, is_limit
from . import policies
from .clip_by import clip_once
from .elements import clamp_once
from .measures import LeafAxis, leaf_norms
from .responses import rescale
from .transformation import Options


def clip_value(
    x: PyTree,
    min_value: Limit,
    max_value: Limit,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""Returns its argument; clips each entry of its cotangent to an interval.

    .. math:: y = x, \qquad \bar{x} = \min(\max(\bar{y}, a), b)

    Forward mode (:func:`jax.jvp`) is a TypeError. Derivatives of a gradient that was
    clipped, in either mode, are those of the clipped one: 0 where the clamp acts.

    Args:
        x: an array or a pytree of arrays; cotangents of integer ones pass through.
        min_value: :math:`a`, in the unit of the cotangent: a number, an array that
            broadcasts against each array of ``x``, entry by entry, or a pytree prefix
            of these; it may be traced. Its own cotangent is 0.
        max_value: :math:`b`, the same.
        nonfinite: as in :func:`optax_clipx.clip_by_value`.
        axis_name: as in :func:`clip_norm`; needed only for ``nonfinite="zero"``.
        specs: as in :func:`clip_norm`.

    Returns:
        ``x``.

    Raises:
        ValueError: if a bound is NaN or ``min_value > max_value``.
        TypeError: if a bound is no number or array; on the way back for complex arrays.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> weights = jnp.array([0.5, -30.0])
        >>> def loss(h):
        ...     return jnp.vdot(weights, clipx.backward.clip_value(h, -1, 1))
        >>> print(jax.grad(loss)(jnp.zeros(2)))
        [ 0.5 -1. ]

    References:
        Graves, Generating sequences with recurrent neural networks, 2013,
        arXiv 1308.0850.
    """
    _refuse_schedules(min_value, "min_value")
    _refuse_schedules(max_value, "max_value")
    options = Options(nonfinite, axis_name, specs, metrics=False)
    clamp_once((), min_value, max_value, options)  # refuses bad bounds now

    def clip(cotangent: PyTree, bounds: PyTree) -> Any:
        low, high = bounds
        return clamp_once(cotangent, low, high, options)

    return _identity(x, jax.tree.map(as_float, (min_value, max_value)), clip)


def clip_norm(
    x: PyTree,
    max_norm: Limit,
    *,
    ord: Ord | None = None,
    batch_axes: LeafAxis = None,
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
) -> Any:
    r"""Returns its argument; clips the norm of its cotangent.

    .. math:: y = x, \qquad \bar{x} = \min(1, t / \|\bar{y}\|)\, \bar{y}

    The norm is that of each array as a whole, wherever on the mesh its parts lie; with
    ``batch_axes`` that of each example. Edge cases are those of
    :func:`optax_clipx.clip_by`. Forward mode (:func:`jax.jvp`) is a TypeError.
    Derivatives of a gradient that was clipped, in either mode, are those of the clipped
    one.

    Args:
        x: an array or a pytree of arrays; cotangents of integer ones pass through.
        max_norm: :math:`t`, in the unit of the cotangent: a number, a scalar array,
            which may be traced, or a pytree prefix of ``x``. Its own cotangent is 0.
        ord: the order of the norm, as for :func:`optax_clipx.measures.tree_norm`.
        batch_axes: axes along which an array holds examples, each clipped by itself:
            an int, a tuple, or a function of path and leaf.
        nonfinite: as in :func:`optax_clipx.clip_by`; by default a cotangent with an
            entry that is not finite becomes NaN as a whole.
        axis_name: the mesh axes over which ``x`` is sharded; ``()`` if it is not. It is
            only needed inside ``pmap``, and inside ``shard_map`` with
            ``check_vma=False``.
        specs: the same for each leaf, as a pytree prefix of ``PartitionSpec``; in
            ``shard_map`` needed for ``batch_axes`` too.

    Returns:
        ``x``.

    Raises:
        ValueError: if ``max_norm`` is negative or NaN, or an option is unknown.
        TypeError: if ``max_norm`` is no number or array.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> weights = jnp.array([30.0, 40.0])
        >>> def loss(h):
        ...     return jnp.vdot(weights, clipx.backward.clip_norm(h, 5.0))
        >>> print(jax.grad(loss)(jnp.zeros(2)))
        [3. 4.]

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
        networks, 2013, arXiv 1211.5063 (the norm), applied where Graves (2013,
        arXiv 1308.0850) clips values.
    """
    _refuse_schedules(max_norm, "max_norm")
    constant(max_norm, "max_norm")  # refuses bad limits now
    policies.check_policy(nonfinite)
    measure = leaf_norms(ord, batch_axes=batch_axes)
    options = Options(nonfinite, axis_name, specs)

    def clip(cotangent: PyTree, limit: PyTree) -> Any:
        rule = constant(limit, "max_norm")
        return clip_once(cotangent, measure, rule, rescale, options)[0]

    return _identity(x, jax.tree.map(as_float, max_norm), clip)


def zero_nonfinite(x: PyTree) -> Any:
    r"""Returns its argument; puts 0 for what is not finite in its cotangent.

    .. math:: y = x, \qquad
              \bar{x}_i = \begin{cases} \bar{y}_i & \text{if finite} \\
                                        0 & \text{else} \end{cases}

    Entry by entry: the others keep their bits. Forward mode is a TypeError, as for
    :func:`clip_value`.

    Args:
        x: an array or a pytree of arrays; cotangents of integer ones pass through.

    Returns:
        ``x``.

    Raises:
        TypeError: in forward mode.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> def loss(x):
        ...     return jnp.sum(jnp.sqrt(clipx.backward.zero_nonfinite(x)))
        >>> print(jax.grad(loss)(jnp.array([0.0, 4.0])))
        [0.   0.25]

    References:
        As in :func:`optax.zero_nans`, within the backward pass.
    """

    def clip(cotangent: PyTree, nothing: PyTree) -> Any:
        return jax.tree.map(_finite_or_zero, cotangent)

    return _identity(x, (), clip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _identity(x: PyTree, limits: PyTree, clip: Callable[[Any, Any], Any]) -> Any:
    """`x`, whose cotangent becomes `clip(cotangent, limits)`."""
    return x


def _forward(
    x: PyTree, limits: PyTree, clip: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    return x, limits


def _backward(
    clip: Callable[[Any, Any], Any], limits: PyTree, cotangent: PyTree
) -> tuple[Any, None]:
    # JAX 0.8 hands over arrays that a program holds as a type of its own.
    limits = jax.tree.map(lambda x: x if is_limit(x) else jnp.asarray(x), limits)
    return clip(cotangent, limits), None  # None is the zero cotangent of the limits


_identity.defvjp(_forward, _backward)


def _finite_or_zero(x: Any) -> Any:
    if x.dtype == jax.dtypes.float0:
        return x
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _refuse_schedules(limit: object, name: str) -> None:
    """Refuses functions in the forward pass, where their line is seen."""
    if any(map(callable, jax.tree.leaves(limit))):
        raise TypeError(
            f"Expected {name} to be a number or array, got {limit!r}. Call a schedule"
            " with its step first."
        )
