"""Thresholds some deviations above the mean: ZClip, Chorowski et al., Levanter."""

from typing import Any

import optax

from .._clipping.responses import rescale
from .._thresholds.zscore import zscore
from .._trees.calls import explains_calls
from .._trees.types import Scalar
from .common import AxisNames, Limit, Scope, Specs, capped, method


@explains_calls
def zclip(
    z_threshold: Limit = 2.5,
    *,
    decay: Scalar = 0.97,
    warmup_steps: Scalar = 25,
    mode: str = "reciprocal",
    clip_factor: Scalar = 1.0,
    max_norm: Limit | None = None,
    stats: str = "clipped",
    patience: Scalar | None = None,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms that are many standard deviations above their mean (ZClip).

    .. math:: z = (n - \mu) / \sigma > z^* \;\Rightarrow\;
              t = \Bigl(\mu + \frac{(z^*)^2}{z} \sigma\Bigr) \cdot \text{factor}

    Here :math:`n` is the norm, :math:`t` the threshold, and :math:`z` the number of
    standard deviations by which the norm is above the mean. A norm with
    :math:`z > z^*` is a spike. The factor is ``clip_factor``.

    The moving mean :math:`\mu` and the moving standard deviation :math:`\sigma` start
    from the first ``warmup_steps`` norms. After that, each norm updates them. If the
    norm is a spike, the threshold updates them instead of the norm. If the standard
    deviation is below 1% of the mean, the formula uses 1% of the mean.

    Two things differ from the official code. After constant norms, the official code
    treats even the smallest change as a spike. After one NaN, it does not clip any
    more. This function does neither.

    A very large norm at the start can hide later spikes. For example, suppose that one
    of the first 100 norms is 200 times the usual norm. Then norms of 20 times the usual
    norm are not clipped for up to 136 steps.

    Args:
        z_threshold: :math:`z^*`, the number of standard deviations above which a norm
            is clipped.
        decay: the decay of the moving averages, from 0 to 1.
        warmup_steps: the number of steps at the start in which nothing is clipped.
        mode: the norm of a clipped spike: ``"reciprocal"`` as in the formula,
            ``"mean"`` for :math:`\mu`, or ``"threshold"`` for
            :math:`\mu + z^*\sigma` ("percentile" in the official code).
        clip_factor: the factor in the formula.
        max_norm: an upper bound of the threshold. ``None`` is no bound. The official
            code uses 1.0; if most norms are above 1, ZClip then acts like a fixed
            threshold of 1.
        stats: what updates the averages after a spike: ``"clipped"`` is the threshold,
            ``"raw"`` is the norm before clipping, and ``"skip"`` is nothing (the skip
            option of the official code).
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            norms of its size are not clipped from then on. ``None`` is 50. In the
            official code, such norms are clipped for ever.
        scope: which entries have a norm together: ``"tree"`` (the whole gradient),
            ``"leaf"`` (each leaf), or a measure such as ``group_norms(labels)``.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has four numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if a name is traced, and from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.zclip(warmup_steps=3)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (0.9, 1.0, 1.1, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)  # 9.0 came down to 1.005
        [1.0052...]

    References:
        Kumar et al., ZClip: Adaptive spike mitigation for LLM pre-training, 2025,
        arXiv 2504.02507.
    """
    rule = zscore(
        z_threshold,
        decay=decay,
        warmup_steps=warmup_steps,
        target=mode,
        clip_factor=clip_factor,
        stats=stats,
        patience=patience,
    )
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


@explains_calls
def log_zscore_clip(
    z_threshold: Limit = 2.0,
    *,
    decay: Scalar = 0.95,
    max_norm: Limit | None = None,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Reduces outliers to the mean norm, in log space (Chorowski et al.).

    .. math:: \log n > m + z^* d \;\Rightarrow\; t = e^m

    Here :math:`m` and :math:`d` are the moving mean and standard deviation of the
    logarithm of the norm :math:`n`; :math:`d` counts as at least 0.01. A norm enters
    them before it is compared, and without clipping: a spike increases :math:`d`, so
    that an equal spike soon after may not be clipped. As the norm enters first, it is
    never more standard deviations above the mean than :math:`\sqrt{\beta/(1-\beta)}`,
    4.4 at the default decay.

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are not clipped for up to 19 steps.

    Args:
        z_threshold: :math:`z^*`, the number of standard deviations above which a norm
            is clipped.
        decay: the decay of the moving averages; the first steps are plain averages.
        max_norm: an upper bound of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has four numbers for each norm.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: from ``update`` as :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.log_zscore_clip()
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped)
        [1.36...]

    References:
        Chorowski et al., End-to-end continuous speech recognition using attention-based
        recurrent NN, 2014, arXiv 1412.1602; TensorFlow 1's ``adaptive_clipping_fn``.
    """
    rule = zscore(
        z_threshold,
        decay=decay,
        warmup_steps=0,
        space="log",
        target="mean",
        include_current=True,
        stats="raw",
    )
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)


@explains_calls
def historical_update_clip(
    z_threshold: Limit = 3.0,
    *,
    window: Any = 128,
    warmup_steps: Scalar = 64,
    stats: str = "raw",
    patience: Scalar | None = None,
    max_norm: Limit | None = None,
    scope: Scope = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates to some deviations above the mean of recent norms (Levanter).

    .. math:: t = \mu + z^* \sigma

    with the mean :math:`\mu` and the standard deviation :math:`\sigma` of the last
    ``window`` norms. It is meant for updates: put it after the optimizer. The
    window holds the norms before clipping. While a spike is in the window, another
    spike of the same size is not clipped. A standard deviation below 1% of the mean
    counts as 1% of the mean.

    If one of the first 100 norms is 200 times the usual norm, later norms of 20 times
    the usual norm are not clipped for up to 128 steps.

    Args:
        z_threshold: :math:`z^*`, the number of standard deviations above which a norm
            is clipped.
        window: the number of norms that are kept.
        warmup_steps: the number of norms that are seen before any is clipped.
        stats: what enters the window on a spike: ``"raw"`` the norm, ``"clipped"`` the
            threshold, or ``"skip"`` nothing.
        patience: with ``patience=n``, the ``n``-th spike in a row is not clipped, and
            its norm is accepted as the new level.
        max_norm: an upper bound of the threshold, on the scale of the updates.
        scope: as in :func:`zclip`.
        nonfinite: as in :func:`clip_by`.
        axis_name: as in :func:`clip_by`.
        specs: as in :func:`clip_by`.
        metrics: whether the state keeps :class:`ClipMetrics`.

    Returns:
        A transformation; its state has the window and two numbers for each norm.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
        TypeError: if ``window`` or a name is traced, and from ``update`` as
            :func:`clip_by`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_clipx as clipx
        >>> clipper = clipx.historical_update_clip(window=4, warmup_steps=2)
        >>> state = clipper.init(jnp.zeros(1))
        >>> for norm in (0.9, 1.1, 9.0):
        ...     clipped, state = clipper.update(jnp.array([norm]), state)
        >>> print(clipped.round(4))
        [1.3]

    References:
        Levanter's ``clip_update_norm`` (Stanford CRFM, Apache-2.0).
    """
    rule = zscore(
        z_threshold,
        window=window,
        warmup_steps=warmup_steps,
        stats=stats,
        patience=patience,
    )
    rule = capped(rule, max_norm)
    return method(scope, rule, rescale, nonfinite, axis_name, specs, metrics)
