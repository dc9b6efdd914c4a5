"""Responses that change smoothly at the threshold, and normalization."""

import functools

import optax

from .._clipping.responses import normalize, smooth
from .._trees.arguments import check_between
from .._trees.calls import explains_calls
from .._trees.types import Scalar
from .common import AxisNames, Limit, Scope, Specs, method


@explains_calls
def smooth_clip(
    max_norm: Limit,
    *,
    p: Scalar = 1.0,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Reduces the norm smoothly, so that it stays below a threshold.

    .. math:: u \leftarrow \bigl(1 + (\|u\| / t)^p\bigr)^{-1/p}\, u

    Args:
        max_norm: :math:`t`, on the scale of the updates: a number, a scalar array, a
            schedule, a prefix, or a threshold rule.
        p: the sharpness, above 0. With 1 the factor is :math:`1/(1 + n/t)` for a norm
            :math:`n`; a large ``p`` approaches :func:`clip_by_global_norm`.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.smooth_clip(1.0).update(jnp.array([3.0]))
        >>> print(clipped)
        [0.75]

    References:
        Zhang et al., Why gradient clipping accelerates training, 2020,
        arXiv 1905.11881.
    """
    check_between(p, "p", 0, float("inf"))
    response = functools.partial(smooth, p=p)
    return method(scope, max_norm, response, nonfinite, axis_name, specs, metrics)


@explains_calls
def normalize_by_norm(
    target: Limit = 1.0,
    *,
    eps: Scalar = 0.0,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every update to the same norm: normalized gradient descent.

    .. math:: u \leftarrow \frac{t}{\|u\| + \epsilon}\, u

    Args:
        target: :math:`t`, on the scale of the updates: a number, a scalar array, a
            schedule, a prefix, or a threshold rule.
        eps: :math:`\epsilon`, on the scale of the updates. With 0, an update of zero
            stays zero.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is negative or NaN.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipped, _ = clipx.normalize_by_norm().update(jnp.array([0.0, 0.25]))
        >>> print(clipped)
        [0. 1.]

    References:
        Cutkosky and Mehta, Momentum improves normalized SGD, 2020, arXiv 2002.03305.
    """
    check_between(eps, "eps", 0, float("inf"))
    response = functools.partial(normalize, eps=eps)
    return method(scope, target, response, nonfinite, axis_name, specs, metrics)
