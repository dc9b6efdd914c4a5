"""`reset_moments`: moments that start anew at an interval."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._devices import mesh
from .._trees.arguments import check_count
from .._trees.leaves import flatten
from .._trees.types import Scalar
from .skip_spikes import _checked, _select


class ResetState(NamedTuple):
    """How many steps there have been, and the optimizer inside."""

    steps: jax.Array
    inner: Any


def reset_moments(
    inner: optax.GradientTransformation, every: Scalar = 500, *, warmup: Scalar = 150
) -> optax.GradientTransformationExtraArgs:
    r"""Resets the state of an optimizer at regular steps, with a warm-up after each.

    .. math:: u \leftarrow u \cdot \tfrac12 \bigl(1 - \cos(\pi \min(k, w) / w)\bigr)

    where :math:`k = 1, 2, \ldots` counts the steps since a reset and :math:`w` is
    ``warmup``; before the first reset, updates are not scaled. A reset replaces the
    whole state of ``inner``, including its step count, by that of ``init`` for the
    current parameters. So put schedules of the learning rate outside, as in
    ``optax.chain(reset_moments(optax.scale_by_adam()), optax.scale_by_schedule(...))``.

    Steps are counted as Optax's schedules count them: every call of ``update``, finite
    or not. Put :func:`skip_spikes` around, and a skipped step does not count.

    Args:
        inner: the optimizer whose state is reset.
        every: the number of steps from one reset to the next.
        warmup: the number of steps in which the updates grow from zero to their full
            size; 0 for none.

    Returns:
        A transformation, which needs ``params`` in ``update``.

    Raises:
        ValueError: if a count is out of range, and from ``update`` without ``params``.
        TypeError: if ``inner`` is no transformation, or keeps something else than
            arrays in its state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_clipx as clipx
        >>> tx = clipx.reset_moments(optax.trace(0.5), every=2, warmup=0)
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update(jnp.ones(1), state, params)
        ...     print(updates)
        [1.]
        [1.5]
        [1.]
        [1.5]

    References:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM
        training, 2025, arXiv 2501.06842.
    """
    check_transformation(inner, "inner")
    check_count(every, "every")
    check_count(warmup, "warmup", 0)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> ResetState:
        with mesh.mesh_of(jax.tree.leaves(params), auto=True):
            return ResetState(jnp.zeros((), jnp.int32), _checked(inner.init(params)))

    def update_fn(
        updates: PyTree, state: ResetState, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, ResetState]:
        check_state(state, ResetState)
        if params is None:
            raise ValueError(
                "Expected params, got None: a reset makes the state anew from them."
                " Call update(updates, state, params)."
            )
        interval = jnp.asarray(every, jnp.int32)
        reset = (state.steps > 0) & (state.steps % interval == 0)
        before = _select(reset, inner.init(params), state.inner)
        updates, after = wrapped.update(updates, before, params, **extra)
        length = jnp.asarray(warmup, jnp.int32).astype(jnp.float32)
        since = (state.steps % interval + 1).astype(jnp.float32)
        done = jnp.where(length > 0, since / jnp.maximum(length, 1), 1)
        scale = 0.5 * (1 - jnp.cos(jnp.pi * jnp.minimum(done, 1)))
        scale = jnp.where(state.steps < interval, 1, scale)
        leaves = flatten(updates)
        scaled = [u * scale.astype(u.dtype) for u in leaves.arrays]
        updates = leaves.rebuild(scaled)
        # The count runs on to know the place, and never overflows.
        steps = state.steps + 1
        steps = jnp.where(steps >= 2 * interval, interval, steps)
        return updates, ResetState(steps, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
