"""Limits that are quantiles: AutoClip, and one that is tracked."""

from typing import Any

import optax

from .._responses import rescale
from .._thresholds._base import check_between
from .._thresholds._quantile import quantile, quantile_tracker
from ._common import capped, method


def autoclip(
    percentile: Any = 10.0,
    *,
    window: Any = None,
    max_steps: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a percentile of the norms so far (AutoClip).

    .. math:: t_k = \mathrm{percentile}_p(n_1, \ldots, n_k)

    Norms enter as they are; see :func:`quantile` for the three ways to keep them and
    what a spike does. At the default 10 nine steps of ten are clipped.

    Args:
        percentile: :math:`p`, between 0 and 100.
        window: keep the last so many norms.
        max_steps: keep so many norms, the whole history up to there. With neither, a
            sketch of 4,000 bytes is kept, within 2.9% of the percentile.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if ``percentile`` is out of range, or ``window`` and ``max_steps``
            are both given.
        TypeError: if ``window`` or ``max_steps`` is traced, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.autoclip(50.0, window=100)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 2.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [2.]

    References:
        Seetharaman et al., AutoClip: Adaptive gradient clipping for source separation
        networks, 2020, arXiv 2007.14469.
    """
    check_between(percentile, "percentile", 0, 100)
    rule = quantile(percentile / 100, window=window, max_steps=max_steps)
    rule = capped(rule, cap)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


def quantile_clip(
    q: Any = 0.9,
    *,
    learning_rate: Any = 0.02,
    window: Any = None,
    cap: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: Any = None,
    specs: Any = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a quantile that is tracked in one number, or in a window.

    .. math:: t_{k+1} = t_k \exp\bigl(-\eta (\mathbb{1}[n_k \le t_k] - q)\bigr)

    With ``window`` the limit is the quantile of the last norms instead. Either way a
    spike has bounded influence; see :func:`quantile_tracker` and :func:`quantile`.

    Args:
        q: the share of steps that should not be clipped, between 0 and 1.
        learning_rate: :math:`\eta` of the tracker.
        window: keep the last so many norms instead of tracking.
        cap: an absolute limit on top, in the unit of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: if ``window`` is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.quantile_clip(0.9)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [0.998...]

    References:
        Andrew et al., Differentially private learning with adaptive clipping, 2021,
        arXiv 1905.03871 (tracker); Merad and Gaïffas, Robust stochastic optimization
        via gradient quantile clipping, 2023, arXiv 2309.17316 (window).
    """
    if window is None:
        rule = quantile_tracker(q, learning_rate=learning_rate)
    else:
        rule = quantile(q, window=window)
    rule = capped(rule, cap)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)
