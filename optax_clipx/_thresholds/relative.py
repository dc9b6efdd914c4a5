"""Thresholds relative to the norm of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from .._reductions.groups import Packed
from .._trees.arguments import Limit, check_limit
from .._trees.arithmetic import larger, product
from .._trees.types import Scalar
from .base import Context, Threshold, stateless
from .constant import at


def relative_to_params(ratio: Limit, eps: Scalar = 1e-3) -> Threshold:
    r"""A threshold in proportion to the norm of the parameters.

    .. math:: t = \lambda \max(\|w\|, \epsilon)

    The parameters are measured as the updates are: with
    :func:`optax_clipx.measures.unit_norms` this is the threshold of adaptive gradient
    clipping.

    Args:
        ratio: :math:`\lambda`, the largest norm of an update relative to its
            parameters; a number, a scalar array or a schedule.
        eps: a floor for the parameters' norm, in their unit. Without one, a unit that
            starts at zero would never train.

    Returns:
        A threshold rule without state, which needs ``params`` in ``update``.

    Raises:
        ValueError: if a number is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> rule = clipx.thresholds.relative_to_params(0.1)
        >>> clipper = clipx.clip_by(clipx.measures.tree_norm(), rule)
        >>> params, grads = jnp.array([10.0]), jnp.array([5.0])
        >>> clipped, _ = clipper.update(grads, clipper.init(params), params)
        >>> print(clipped)
        [1.]

    References:
        Brock et al., High-performance large-scale image recognition without
        normalization, 2021, arXiv 2102.06171.
    """
    check_limit(ratio, "ratio")
    check_limit(eps, "eps")

    def limits(norms: Packed, context: Context) -> Any:
        def limit(norm: jax.Array, param_norm: jax.Array) -> jax.Array:
            floor, factor = (
                x if isinstance(x, float | int) else jnp.asarray(x).astype(norm.dtype)
                for x in (at(eps, context.step), at(ratio, context.step))
            )
            return product(larger(param_norm, floor), factor)

        return jax.tree.map(limit, norms, context.params_norms)

    uses_step = callable(ratio) or callable(eps)
    return stateless(limits, uses_params=True, uses_step=uses_step, uses_norms=False)
