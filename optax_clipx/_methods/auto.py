"""The clipper without a number to choose."""

from typing import Any

import optax

from .._clipping.responses import rescale
from .._thresholds.auto import auto
from .._trees.arguments import AxisNames, Specs
from .common import method


def auto_clip(
    *,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a threshold that it finds by itself.

    .. math:: u_i \leftarrow \min(1, 2 m_k / n_k)\, u_i

    The threshold at step :math:`k` is :math:`2 m_k`, where :math:`m_k` estimates the
    5th percentile of the norms: only 5% of the steps have a smaller norm.
    :func:`thresholds.auto` describes the rule. If
    norms vary little, the threshold is above nearly all of them, and only spikes are
    clipped. If norms have heavy tails, it is below their median, and most steps are
    clipped.

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are not clipped for up to 4 steps. Multiplying the loss by a constant
    changes nothing: the same steps are clipped by the same factors.

    Args:
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state is eight numbers for each norm.

    Raises:
        ValueError: if ``scope`` or ``nonfinite`` is unknown.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.auto_clip()
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 1.1, 0.9, 1.0, 50.0, 1.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        ...     print(f"{clipx.metrics(state)['clip/clipped_norm']:.2f}")
        1.00
        1.10
        0.90
        1.00
        1.29
        1.00

    References:
        See :func:`thresholds.auto`.
    """
    return method(scope, auto(), rescale, nonfinite, axis_name, specs, metrics)
