"""Thresholds that do not depend on the norms: numbers, arrays, schedules."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._reductions.groups import Packed
from .._trees.arguments import Limit, as_float, check_limit, is_limit
from .._trees.arithmetic import shaped_like
from .._trees.leaves import from_prefix
from .._trees.types import Scalar
from .base import Context, Threshold, is_pair, stateless


def constant(limit: Limit, name: str = "limit", *, signed: bool = False) -> Threshold:
    r"""A fixed threshold :math:`t`: a number, an array or a schedule.

    Args:
        limit: a number or scalar array; an optax schedule, called with the number of
            updates so far, from 0; or a pytree prefix of the updates with one of
            these for each leaf. For labelled groups a dict from label to threshold.
        name: what an error message calls the threshold.
        signed: whether it may be negative, as one end of an interval may.

    Returns:
        A threshold rule without state.

    Raises:
        ValueError: if a number is negative or NaN, an array is no scalar, or a leaf
            or group has no threshold.
        TypeError: if a threshold is no number, array or schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.constant(optax.linear_schedule(4.0, 1.0, 3))
        >>> context = clipx.thresholds.Context(step=2)
        >>> thresholds, _ = rule.update(jnp.float32(9.0), (), context)
        >>> print(thresholds)
        2.0

    References:
        Pascanu et al., 2013, arXiv 1211.5063.
    """
    if is_limit(limit):
        check_limit(limit, name, signed=signed)
        return stateless(
            lambda norms, context: shaped_like(at(limit, context.step), norms),
            uses_step=callable(limit),
            uses_norms=False,
        )
    entries = jax.tree_util.tree_leaves_with_path(limit, is_leaf=lambda x: x is None)
    for keys, value in entries:
        if value is None and keys:  # of use only opposite a None in the updates
            continue
        check_limit(value, name + jax.tree_util.keystr(keys), signed=signed)

    def limits(norms: Packed, context: Context) -> Any:
        if context.labels is not None:
            values = [
                at(_of_label(limit, k, name), context.step) for k in context.labels
            ]
            return jnp.stack([jnp.asarray(v).astype(norms.dtype) for v in values])
        if context.pack is None or (not isinstance(norms, tuple) and norms.ndim == 0):
            raise ValueError(
                f"Expected a single {name} for the norm of the whole tree, got"
                f" {limit!r}."
            )
        leaves = jax.tree.leaves(norms)
        given = from_prefix(limit, context.paths, name)
        values = [at(v, context.step) for v in given]
        dtype = leaves[0].dtype
        packed = context.pack([jnp.asarray(v).astype(dtype) for v in values])
        return jax.tree.map(lambda t, n: jnp.broadcast_to(t, n.shape), packed, norms)

    uses_step = any(callable(value) for _, value in entries)
    return stateless(limits, uses_step=uses_step, uses_norms=False)


def as_threshold(value: Limit | Threshold, name: str = "threshold") -> Threshold:
    """A rule from whatever may stand for one."""
    if isinstance(value, Threshold):
        return value
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"Expected {name} to be a number or a threshold rule, got an optax"
            f" transformation: {value!r}."
        )
    if is_pair(value):
        return Threshold(value[0], value[1])
    return constant(value, name)


def at(limit: Limit, step: Scalar) -> Any:
    """The threshold at this step."""
    return as_float(limit(step) if callable(limit) else limit)


def _of_label(limits: Limit, label: Hashable, name: str) -> Any:
    if not isinstance(limits, dict):
        raise TypeError(
            f"Expected {name} to be a dict from label to threshold, got {limits!r}."
        )
    if label not in limits:
        raise ValueError(
            f"Expected a threshold for every label, got none for {label!r}: {name} has"
            f" {sorted(limits, key=str)}."
        )
    return limits[label]
