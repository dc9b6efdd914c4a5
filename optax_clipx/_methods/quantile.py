"""Thresholds that are quantiles of the norms so far, as in AutoClip."""

from typing import Any

import optax

from .._clipping.responses import rescale
from .._thresholds.quantile import quantile as quantile_rule, quantile_tracker
from .._trees.arguments import check_choice
from .._trees.calls import explains_calls
from .._trees.types import Scalar
from .common import AxisNames, Limit, Scope, Specs, capped, method


@explains_calls
def quantile_clip(
    quantile: Scalar = 0.1,
    *,
    estimator: str = "histogram",
    window: Any = None,
    max_steps: Any = None,
    tracker_rate: Scalar = 0.02,
    max_norm: Limit | None = None,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms to a quantile of the norms so far (AutoClip).

    .. math:: t_k = \mathrm{quantile}_q(n_1, \ldots, n_k)

    The threshold at step :math:`k` is the :math:`q`-quantile of the norms
    :math:`n_1, \ldots, n_k` before clipping. So a fraction of :math:`1 - q` of the
    steps is clipped. With the default of 0.1, nine of ten steps are clipped by design.

    With ``estimator="tracker"`` the state is one number: the threshold. In each step it
    moves by a small factor toward the quantile:

    .. math:: t_{k+1} = t_k \exp\bigl(-\eta (\mathbb{1}[n_k \le t_k] - q)\bigr)

    A very large norm at the start can hide later spikes if the quantile is high. For
    example, suppose that one of the first 100 norms is 200 times the usual norm. With
    the default, later norms of 20 times the usual norm are still clipped. With
    ``quantile=0.9`` and a window of 100, they are not clipped for up to 10 steps. With
    ``quantile=0.9`` and the tracker, they are not clipped for at least 300 steps.

    Args:
        quantile: :math:`q`, the fraction of norms that lie below the threshold, between
            0 and 1. A fraction of :math:`1 - q` of the steps is clipped.
        estimator: ``"histogram"`` keeps a histogram of all norms, which takes 4,000
            bytes. Its quantile differs from the exact quantile by at most 2.9%; see
            :func:`thresholds.quantile`. ``"tracker"`` keeps one number; see
            :func:`thresholds.quantile_tracker`.
        window: keep the last ``window`` norms instead of a histogram of all norms.
        max_steps: keep the last ``max_steps`` norms instead of a histogram. In a run
            with at most this number of steps, these are all norms.
        tracker_rate: :math:`\eta`, the rate of the tracker.
        max_norm: an upper bound of the threshold. ``None`` is no bound.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation. Its state has the histogram, the norms or the threshold.

    Raises:
        ValueError: if ``quantile`` is out of range or ``estimator`` is unknown, or if
            you ask for more than one of ``window``, ``max_steps`` and the tracker.
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
