"""Thresholds some deviations above the mean: ZClip, Chorowski et al., Levanter."""

from typing import Any

import optax

from .._clipping.responses import rescale
from .._thresholds.zscore import zscore
from .._trees.arguments import AxisNames, Limit, Specs
from .common import capped, method


def zclip(
    z_threshold: Any = 2.5,
    *,
    decay: Any = 0.97,
    warmup_steps: Any = 25,
    mode: str = "reciprocal",
    clip_factor: Any = 1.0,
    max_norm: Limit | None = None,
    stats: str = "clipped",
    patience: Any = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms whose z-score among the norms so far is large (ZClip).

    .. math:: z = (n - \mu) / \sigma > z^* \;\Rightarrow\;
              t = \Bigl(\mu + \frac{(z^*)^2}{z} \sigma\Bigr) \cdot \text{factor}

    :math:`\mu, \sigma` are moving averages of :math:`x = t` on a spike and of
    :math:`x = n` else, begun with the first ``warmup_steps`` norms; see
    :func:`thresholds.zscore` for what that risks. A standard deviation below 1% of the
    mean counts as 1%: in the official code constant norms make the smallest change a
    spike, and one NaN ends clipping for good.

    One norm of 200 times the usual one in the first 100 steps hides later ones:
    for up to 136 steps, one of 20 times is not clipped.

    Args:
        z_threshold: :math:`z^*`.
        decay: the decay of the moving averages.
        warmup_steps: how many norms to see before clipping.
        mode: where a spike goes: ``"reciprocal"``, ``"mean"`` (:math:`\mu`) or
            ``"threshold"`` (:math:`\mu + z^*\sigma`, "percentile" in the official
            code).
        clip_factor: a factor of the reciprocal target.
        max_norm: an absolute threshold on top, in the unit of the updates. ``None`` on
            purpose: the official 1.0 makes a fixed clipper of it.
        stats: what enters on a spike: ``"clipped"``, ``"raw"`` or ``"skip"`` (the
            official skip option, which only leaves the averages alone).
        patience: how many spikes in a row it takes until the last of them is accepted,
            and its level. ``None`` is 50; the official code never accepts one.
        scope: what is measured together: ``"tree"``, ``"leaf"`` or a measure such as
            ``group_norms(labels)``.
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


def log_zscore_clip(
    z_threshold: Any = 2.0,
    *,
    decay: Any = 0.95,
    max_norm: Limit | None = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings norms far above the usual in log space to the mean (Chorowski et al.).

    .. math:: \log n > m + z^* d \;\Rightarrow\; t = e^m

    :math:`m` and :math:`d` are moving mean and standard deviation of :math:`\log n`,
    this norm included before it is judged; :math:`d` counts as at least 0.01. Norms
    enter as they are: a spike widens :math:`d` and can hide an equal one soon after. As
    the norm enters first, no z-score exceeds :math:`\sqrt{\beta/(1-\beta)}`, 4.4 at the
    default decay.

    One norm of 200 times the usual one in the first 100 steps hides later ones:
    for up to 19 steps, one of 20 times is not clipped.

    Args:
        z_threshold: :math:`z^*`.
        decay: the decay of the moving averages, which are plain averages first.
        max_norm: an absolute threshold on top, in the unit of the updates.
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


def historical_update_clip(
    z_threshold: Any = 3.0,
    *,
    window: Any = 128,
    warmup_steps: Any = 64,
    stats: str = "raw",
    patience: Any = None,
    max_norm: Limit | None = None,
    scope: Any = "tree",
    nonfinite: str = "propagate",
    axis_name: AxisNames = None,
    specs: Specs = None,
    metrics: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates to some deviations above the mean of their last norms (Levanter).

    .. math:: t = \mu + z^* \sigma

    of the last ``window`` norms. Meant for updates, after the optimizer. Norms enter as
    they are, so a spike in the window hides an equal one; see
    :func:`thresholds.zscore`. A standard deviation below 1% of the mean counts as 1%.

    One norm of 200 times the usual one in the first 100 steps hides later ones:
    for up to 128 steps, one of 20 times is not clipped.

    Args:
        z_threshold: :math:`z^*`.
        window: how many norms to keep.
        warmup_steps: how many norms to see before clipping.
        stats: what enters on a spike: ``"raw"``, ``"clipped"`` or ``"skip"``.
        patience: after so many spikes in a row their level is accepted.
        max_norm: an absolute threshold on top, in the unit of the updates.
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
