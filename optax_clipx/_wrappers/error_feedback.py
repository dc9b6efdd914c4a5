"""Error feedback: what a clipper cut off comes back in the next step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._clipping.entries import moments_in, rebuild, zeros_like
from .._clipping.metrics import zeroed
from .._clipping.transformation import check_state
from .._clipping.uncalled import check_transformation
from .._trees.leaves import flatten


class ErrorState(NamedTuple):
    """The state of the clipper inside, and what it has cut off of each entry so far."""

    inner: Any
    error: Any


def error_feedback(
    clipper: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clipper cut off to the next gradient, against its bias (U-Clip).

    .. math:: u_k = \mathrm{clip}(g_k + e_k), \qquad e_{k+1} = g_k + e_k - u_k

    Here :math:`g_k` is the gradient at step :math:`k`, :math:`u_k` the update, and
    :math:`e_k` the error: what was cut off so far. The mean of clipped gradients is
    biased if their noise is skewed. With the error, the sum of all updates differs from
    the sum of all gradients by :math:`e` only. The error stays bounded if the threshold
    is above the norm of the mean gradient; otherwise it grows without end, and so does
    the norm in the clipper's metrics.

    An entry of a gradient that is infinite or NaN counts as 0 in these sums, with every
    policy of the clipper. An entry whose update is non-finite keeps its error. If the
    policy ``"zero"`` drops a step, the error does not change; for a clipper without
    metrics, the finite entries of that gradient are added to it.

    Args:
        clipper: any clipper, of this package or another.

    Returns:
        A transformation. The error is kept in float32 or wider, one number for each
        entry, in a tree like the parameters. A ``norm=`` passed to ``update`` is not
        used.

    Raises:
        ValueError: from ``update`` if there are other leaves than at ``init``.
        TypeError: if ``clipper`` is no transformation, and from ``update`` for integer
            leaves and leaves that are no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.error_feedback(clipx.clip_by_global_norm(1.0))
        >>> state = clipper.init(jnp.zeros(1))
        >>> for gradient in (2.5, 0.0, 0.0):
        ...     clipped, state = clipper.update(jnp.array([gradient]), state)
        ...     print(clipped)
        [1.]
        [1.]
        [0.5]

    References:
        Elesedy and Hutter, U-Clip: On-average unbiased stochastic gradient clipping,
        2023, arXiv 2302.02971.
    """
    check_transformation(clipper, "clipper")
    wrapped = optax.with_extra_args_support(clipper)

    def init_fn(params: PyTree) -> ErrorState:
        leaves = flatten(params, updates=False)
        return ErrorState(clipper.init(params), zeros_like(leaves))

    def update_fn(
        updates: PyTree, state: ErrorState, params: PyTree = None, **extra: PyTree
    ) -> tuple[Any, ErrorState]:
        check_state(state, ErrorState)
        leaves = flatten(updates)
        errors = moments_in(state.error, leaves)
        # A norm that was computed elsewhere is not that of what is clipped here.
        extra.pop("norm", None)
        whole = [
            x.astype(e.dtype) + e for x, e in zip(leaves.arrays, errors, strict=True)
        ]
        feed = [_within(w, x) for w, x in zip(whole, leaves.arrays, strict=True)]
        clipped, inner = wrapped.update(
            leaves.rebuild(feed), state.inner, params, **extra
        )
        dropped = zeroed(inner)
        paid = flatten(clipped).arrays
        rest = [
            _rest(e, w, u.astype(e.dtype), dropped)
            for e, w, u in zip(errors, whole, paid, strict=True)
        ]
        return clipped, ErrorState(inner, rebuild(state.error, rest))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rest(
    error: jax.Array, whole: jax.Array, paid: jax.Array, dropped: jax.Array
) -> jax.Array:
    """What is owed after a step; a gradient that is not finite was never owed."""
    rest = jnp.where(jnp.isfinite(whole), whole, error) - paid
    keeps = ~jnp.isfinite(rest) | (dropped & (paid == 0))
    return jnp.where(keeps, error, rest)


def _within(whole: PyTree, like: PyTree) -> Any:
    """In the dtype of the updates; what was finite there stays so."""
    if jnp.iscomplexobj(like):
        return whole.astype(like.dtype)
    most = float(jnp.finfo(like.dtype).max)
    held = jnp.where(jnp.isfinite(like), jnp.clip(whole, -most, most), whole)
    return held.astype(like.dtype)
