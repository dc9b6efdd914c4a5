"""Thresholds that are quantiles of the norms so far, as in AutoClip."""

from typing import Any

import optax

from .._clipping.responses import rescale
from .._thresholds.quantile import quantile as quantile_rule, quantile_tracker
from .._trees.arguments import AxisNames, Limit, Specs, check_choice
from .common import capped, method


def quantile_clip(
    quantile: Any = 0.1,
    *,
    estimator: str = "histogram",
    window: Any = None,
    max_steps: Any = None,
    tracker_rate: Any = 0.02,
    max_norm: Limit | None = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a quantile of the norms so far (AutoClip).

    .. math:: t_k = \mathrm{quantile}_q(n_1, \ldots, n_k)

    The threshold at step :math:`k` is the :math:`q`-quantile of all norms
    :math:`n_1, \ldots, n_k` before clipping, so a fraction of :math:`1 - q` of the
    steps is clipped: nine of ten with the default of 0.1. With
    ``estimator="tracker"`` the state is one number, which moves by a small factor
    toward the quantile:

    .. math:: t_{k+1} = t_k \exp\bigl(-\eta (\mathbb{1}[n_k \le t_k] - q)\bigr)

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are still clipped. With ``quantile=0.9`` they are not clipped for up
    to 10 steps with a window of 100, and for 300 steps and more with the tracker.

    Args:
        quantile: :math:`q`, the fraction of norms that lie below the threshold, between
            0 and 1. A fraction of :math:`1 - q` of the steps is clipped.
        estimator: ``"histogram"`` keeps a histogram of 4,000 bytes of the whole
            history, within 2.9% of the quantile; see
            :func:`thresholds.quantile`. ``"tracker"`` keeps one number;
            see :func:`thresholds.quantile_tracker`.
        window: use the last ``window`` norms instead of a histogram of all.
        max_steps: keep all norms of a run with at most this number of steps, instead
            of a histogram.
        tracker_rate: :math:`\eta`, the rate of the tracker.
        max_norm: an upper limit of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation.

    Raises:
        ValueError: if ``quantile`` is out of range, ``estimator`` is unknown, or more
            than one of ``window``, ``max_steps`` and the tracker is asked for.
        TypeError: if ``window`` or ``max_steps`` is traced, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.quantile_clip(0.5, window=100)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 2.0, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [2.]

    References:
        Seetharaman et al., AutoClip: Adaptive gradient clipping for source separation
        networks, 2020, arXiv 2007.14469. Merad and Gaïffas, Robust stochastic
        optimization via gradient quantile clipping, 2023, arXiv 2309.17316 (window).
        Andrew et al., Differentially private learning with adaptive clipping, 2021,
        arXiv 1905.03871 (tracker).
    """
    check_choice(estimator, "estimator", ("histogram", "tracker"))
    if estimator == "tracker":
        if window is not None or max_steps is not None:
            raise ValueError(
                f"Expected no window and no max_steps beside estimator='tracker', got"
                f" window={window} and max_steps={max_steps}: the tracker keeps one"
                " number. Leave estimator out to keep norms themselves."
            )
        rule = quantile_tracker(quantile, learning_rate=tracker_rate)
    else:
        rule = quantile_rule(quantile, window=window, max_steps=max_steps)
    return method(
        scope, capped(rule, max_norm), rescale, nonfinite, axis_name, specs, metrics
    )
